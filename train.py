"""Training as Cog and Replicate run it; `scripts/train` runs the same from a shell."""

from pathlib import Path
from typing import Optional

import cog
from cog import BaseModel, Input

ROOT = Path(__file__).resolve().parent


class TrainingOutput(BaseModel):
    """The output of a training on Replicate."""

    weights: cog.Path


async def train(
    train_data: cog.Path = Input(
        description="Examples: JSONL or Parquet with messages, prompt and completion, instruction and output, or text.",
    ),
    base_model: Optional[str] = Input(
        description="Base model to fine-tune: hf://organisation/name@revision, https://….tar, https://…/manifest.json, a folder, or embedded. Empty: model.yaml's.",  # noqa: E501
        default=None,
    ),
    epochs: Optional[float] = Input(
        description="Passes over the examples. Empty: model.yaml's.", default=None, ge=0.01, le=100
    ),
    max_steps: Optional[int] = Input(
        description="Number of optimizer steps; overrides epochs. Empty: model.yaml's.", default=None, ge=1, le=1000000
    ),
    learning_rate: Optional[float] = Input(
        description="Peak learning rate, typically 0.0001 to 0.002 for LoRA. Empty: model.yaml's.",
        default=None,
        ge=0.0000001,
        le=1.0,
    ),
    rank: Optional[int] = Input(
        description="Rank of the adapter: a higher one learns more and takes more memory. Empty: model.yaml's.",
        default=None,
        ge=1,
        le=512,
    ),
    alpha: Optional[float] = Input(
        description="LoRA alpha; alpha divided by rank scales the adapter. Empty: model.yaml's, or twice the rank.",
        default=None,
        ge=0.01,
        le=2048,
    ),
    dropout: Optional[float] = Input(
        description="Dropout on the inputs of the adapter. Empty: model.yaml's.",
        default=None,
        ge=0.0,
        le=0.9,
    ),
    target_modules: Optional[str] = Input(
        description="Layers to adapt: all-linear, or names such as q_proj,v_proj. Empty: model.yaml's.", default=None
    ),
    max_length: Optional[int] = Input(
        description="Maximum tokens in an example; longer ones are left out and counted. Empty: model.yaml's.",
        default=None,
        ge=8,
        le=131072,
    ),
    batch_size: Optional[int] = Input(
        description="Examples per forward pass. Empty: model.yaml's.", default=None, ge=1, le=1024
    ),
    gradient_accumulation: Optional[int] = Input(
        description="Forward passes per optimizer step. Empty: model.yaml's.", default=None, ge=1, le=1024
    ),
    validation_share: Optional[float] = Input(
        description="Share of the examples held out for validation. Empty: model.yaml's.",
        default=None,
        ge=0.0,
        le=0.5,
    ),
    seed: Optional[int] = Input(
        description="Random seed for the order of the examples and the initial adapter. Empty: model.yaml's.",
        default=None,
        ge=0,
        le=4294967295,
    ),
    quantization: str = Input(
        description="Quantization of the base in training: nf4 (QLoRA, least memory), int8, none, or as in model.yaml.",
        default="model.yaml",
        choices=["model.yaml", "nf4", "int8", "none"],
    ),
    optimizer: str = Input(
        description="Optimizer: auto takes paged_adamw_8bit on a GPU and adamw on a CPU; or as in model.yaml.",
        default="model.yaml",
        choices=["model.yaml", "auto", "adamw", "paged_adamw_8bit", "paged_adamw_32bit"],
    ),
    skip_bad_lines: bool = Input(
        description="Skip bad lines and count them, instead of refusing the file.", default=False
    ),
) -> TrainingOutput:
    """Fine-tune the base on the examples and return one tar that predict.py serves."""
    inputs = dict(locals())  # the inputs alone, as nothing else has a name yet
    from cogpress import image_training

    return TrainingOutput(weights=cog.Path(await image_training.run(ROOT, inputs)))
