"""The runner that Cog serves: the inputs of a prediction and its stream of text."""

from pathlib import Path
from typing import Optional

import cog
from cog import BaseRunner, ConcatenateIterator, Input

ROOT = Path(__file__).resolve().parent


class Runner(BaseRunner):
    """Serves one model; docs/serving.md shows the inputs by example."""

    def setup(self, weights: Optional[cog.Path] = None) -> None:
        """Load `weights` (any source that README lists), by default the folder weights/."""
        from cogpress import config
        from cogpress.cog import ending, streaming
        from cogpress.serve import model as serving

        streaming.install()
        self.server = serving.ServedModel(
            weights, config.load(ROOT / "model.yaml"), ROOT, concurrency=type(self).run.__cog_concurrent_max__
        )
        self.server.engine.yield_cores()
        ending.watch()

    def healthcheck(self) -> bool:
        """Whether the engine can answer."""
        return not self.server.engine.dead

    @cog.streaming
    @cog.concurrent(max=80)
    async def run(
        self,
        # --- inputs: scripts/form writes them from model.yaml ---
        question: Optional[str] = Input(description="What to look up, in plain English.", default=None),
        columns: Optional[str] = Input(
            description="The columns that the query may use. One per line, or separated by commas.", default=None
        ),
        max_tokens: int = Input(
            description="Maximum number of tokens to generate; a token is about four characters.",
            default=512,
            ge=1,
            le=131072,
        ),
        temperature: float = Input(
            description="Randomness: 0 always picks the most likely token, 1 samples as the model predicts.",
            default=0.0,
            ge=0.0,
            le=5.0,
        ),
        top_p: float = Input(
            description="Sample from the most likely tokens that together reach this probability; 1 for all.",
            default=1.0,
            ge=0.01,
            le=1.0,
        ),
        top_k: int = Input(
            description="Sample from this many of the most likely tokens; 0 for all.", default=0, ge=0, le=1000
        ),
        min_p: float = Input(
            description="Drop tokens less likely than this fraction of the most likely one; 0 drops none.",
            default=0.0,
            ge=0.0,
            le=1.0,
        ),
        stop: str = Input(
            description='Text that ends the answer and is left out; several as a JSON list, such as ["END", "##"].',
            default="",
        ),
        seed: Optional[int] = Input(
            description="Random seed, to repeat an answer when temperature is above 0. Empty: random.",
            default=None,
            ge=0,
            le=9007199254740991,
        ),
        json_schema: Optional[str] = Input(
            description='JSON schema that the answer must follow, such as {"type": "object", "properties": {"op": {"enum": ["COUNT", "AVG"]}}, "required": ["op"]}.',
            default=None,
        ),
        regex: Optional[str] = Input(
            description="Regular expression that the whole answer must match, such as [A-Z]{3}-[0-9]+.", default=None
        ),
        choices: Optional[str] = Input(
            description='The only answers allowed, as a JSON list, such as ["yes", "no"].', default=None
        ),
        grammar: Optional[str] = Input(
            description='EBNF grammar that the answer must follow, such as root ::= "SELECT " [a-z]+.', default=None
        ),
        tools: Optional[str] = Input(
            description='Functions that the model may call, as a JSON list of {"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}. For models whose chat template supports tools.',
            default=None,
        ),
        thinking: Optional[bool] = Input(
            description="Whether to reason before answering, for models that can do both. Empty: its default.",
            default=None,
        ),
        min_tokens: int = Input(
            description="Minimum number of tokens to generate before the answer may end.", default=0, ge=0, le=131072
        ),
        repetition_penalty: float = Input(
            description="Above 1 makes tokens that are already in the prompt or the answer less likely.",
            default=1.0,
            ge=0.1,
            le=5.0,
        ),
        presence_penalty: float = Input(
            description="Above 0 makes tokens that are already in the answer less likely, however often they occur.",
            default=0.0,
            ge=-2.0,
            le=2.0,
        ),
        frequency_penalty: float = Input(
            description="Above 0 makes tokens less likely each time they occur in the answer.",
            default=0.0,
            ge=-2.0,
            le=2.0,
        ),
        logit_bias: Optional[str] = Input(
            description='Biases tokens from -100 to 100: a JSON object from a token, as text or id, to its bias, such as {"yes": 5}.',
            default=None,
        ),
        logprobs: Optional[int] = Input(
            description="Report the log-probability of each token, and of this many of the most likely tokens at its position, in the metrics. Empty: none.",
            default=None,
            ge=0,
            le=20,
        ),
        adapter: str = Input(
            description="Name of the adapter to use, for a model served with several. Empty: the base without one.",
            default="",
        ),
        system_prompt: Optional[str] = Input(
            description="Instructions for the whole conversation. Empty: those used in training.", default=None
        ),
        prompt: str = Input(description="Text to send to the model.", default=""),
        messages: Optional[str] = Input(
            description='A whole conversation as a JSON list of {"role": "user" | "assistant" | "system", "content": "..."}, ending with the user. Replaces prompt and fields.',
            default=None,
        ),
        fields: Optional[str] = Input(
            description='Values for the prompt template of this model, as a JSON object, such as {"question": "10 player.uid with the highest p95 of agent.idle", "columns": ["agent.util", "cart.uid", "order.label", "agent.idle", "player.uid", "payment.card"]}. Replaces prompt.',
            default=None,
        ),
        # --- end of the inputs ---
    ) -> ConcatenateIterator[str]:
        """Stream an answer."""
        inputs = {**locals()}  # the inputs alone, as nothing else has a name yet
        del inputs["self"]
        from cogpress.cog.streaming import stream

        answer = await self.server.answer(inputs, self.scope.record_metric)
        return stream(answer)  # type: ignore[return-value]
