"""A small base of another family, trained from nothing in minutes, and an adapter of it: a second architecture.

It is shaped like Qwen 3 (norms of queries and keys, tied embeddings), where the embedded base is a Llama. It has read
the kit's own pages, its general text and questions of the worked example; its adapter names the operation that a
question asks for.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from cogpress import config
from cogpress.data import prepare
from cogpress.data.prepare import Prepared
from cogpress.files import new_folder
from cogpress.merge import general
from cogpress.train import run as training
from cogpress.weights import base
from examples import questions

VOCABULARY = 2048
STEPS, BATCH, LENGTH, RATE = 300, 8, 128, 3e-3
"""Of the training from nothing."""

SETTINGS = config.parse(
    {
        "prompt": {"system": "Name the operation.", "template": "{question}"},
        "train": {"max_steps": 200, "batch_size": 8, "learning_rate": 0.003, "rank": 8, "evaluations": 0},
    },
    "the benchmark",
)
"""How its adapter is trained."""


def make(folder: Path, root: Path, *, steps: int = STEPS) -> Path:
    """Train the base from nothing, unless the folder has it, and return the folder.

    Args:
        folder: takes the base.
        root: the project's folder, whose pages it reads.
        steps: of the training.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    if (folder / "config.json").is_file():
        return folder
    asked = [row["question"] for row in questions.generate(400, "train", seed=5)]
    texts = [*general.texts("fit"), *(path.read_text(encoding="utf-8") for path in sorted(root.glob("docs/*.md")))]
    tokenizer = _tokenizer([*texts, *asked])
    ids = torch.tensor([one for text in [*texts, "\n".join(asked)] for one in tokenizer(text)["input_ids"]])
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    for _ in range(steps):
        starts = torch.randint(len(ids) - LENGTH, (BATCH,))
        batch = torch.stack([ids[at : at + LENGTH] for at in starts.tolist()])
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with new_folder(folder) as part:
        model.to(torch.bfloat16).save_pretrained(part)
        tokenizer.save_pretrained(part)
    return folder


def adapter(folder: Path, run: Path, count: int, console: Console) -> tuple[Path, Prepared, Prepared]:
    """Train the adapter, unless the run has it: its folder, its examples, and `count` others to measure on."""
    run.mkdir(parents=True, exist_ok=True)
    tokenizer, stops = base.tokenizer(folder), base.stop_ids(folder)
    made = []
    for name, number, kind, share in (("train", 960, "train", 0.06), ("test", count, "test", 0.0)):
        path = run / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows(number, kind, 3)), encoding="utf-8")
        settings = SETTINGS.override({"validation_share": share})
        made.append(prepare.prepare_as(settings, path, tokenizer, stops, validation_path=None, skip_bad=False))
    learnt, test = made
    found = training.train(SETTINGS, learnt, folder, run / "training", console=console)
    return found.adapter, learnt, test


def rows(count: int, split: str, seed: int) -> list[dict[str, str]]:
    """Examples of the small base's task."""
    made = []
    for row in questions.generate(count, split, seed):
        [calculation] = json.loads(row["answer"])["calculations"]
        made.append({"prompt": row["question"], "completion": f"The operation is {calculation['op']}."})
    return made


def _tokenizer(texts: Sequence[str]) -> Any:
    """Pairs of bytes, learnt from the texts, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|start|>", "<|end|>", "<|pad|>"]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator(random.Random(0).sample(texts, len(texts)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=special[0],
        eos_token=special[1],
        pad_token=special[2],
        chat_template="{% for one in messages %}{{ one.role }}: {{ one.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
    )
