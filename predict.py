"""What runs on Replicate: the form that people see, and the stream that programs read."""

from pathlib import Path
from typing import Optional

import cog
from cog import BaseRunner, ConcatenateIterator, Input

ROOT = Path(__file__).resolve().parent


class Runner(BaseRunner):
    """Serves one model; see README for each input by example."""

    def setup(self, weights: Optional[cog.Path] = None) -> None:
        """Load `weights` (a source, as README lists them), by default the folder weights/."""
        from cogpress import config
        from cogpress.cog import streaming
        from cogpress.serve import model as serving

        streaming.install()
        self.server = serving.Server(
            weights, config.load(ROOT / "model.yaml"), ROOT, concurrency=type(self).run.__cog_concurrent_max__
        )
        self.server.engine.settle()

    def healthcheck(self) -> bool:
        """Whether the engine can answer."""
        return not self.server.engine.dead

    @cog.streaming
    @cog.concurrent(max=80)
    async def run(
        self,
        prompt: str = Input(description="What to ask the model.", default=""),
        system_prompt: Optional[str] = Input(
            description="Instructions for the whole conversation. Empty: the ones that the model was trained with.",
            default=None,
        ),
        fields: Optional[str] = Input(
            description='Values for the prompt template of this model, as a JSON object, such as {"question": "slowest endpoints in the last hour", "columns": ["http.route", "duration_ms"]}. Takes the place of the prompt.',  # noqa: E501
            default=None,
        ),
        messages: Optional[str] = Input(
            description='A whole conversation as a JSON list of {"role": "user" | "assistant" | "system", "content": "..."}, ending with the user. Takes the place of prompt and fields.',  # noqa: E501
            default=None,
        ),
        adapter: str = Input(
            description="Which of the model's adapters answers, by name, where it is served with several. Empty: none.",
            default="",
        ),
        max_tokens: int = Input(
            description="The most tokens to generate; a token is about four characters.", default=512, ge=1, le=131072
        ),
        temperature: float = Input(
            description="Randomness: 0 always gives the most likely answer, 1 follows the model's own probabilities.",
            default=0.0,
            ge=0.0,
            le=5.0,
        ),
        top_p: float = Input(
            description="Choose among the most likely tokens that together have this probability; 1 for all.",
            default=1.0,
            ge=0.01,
            le=1.0,
        ),
        top_k: int = Input(
            description="Choose among this many of the most likely tokens; 0 for all.", default=0, ge=0, le=1000
        ),
        min_p: float = Input(
            description="Leave out tokens less likely than this share of the most likely one; 0 for none.",
            default=0.0,
            ge=0.0,
            le=1.0,
        ),
        stop: str = Input(
            description='Text that ends the answer and is left out; several as a JSON list, such as ["END", "##"].',
            default="",
        ),
        seed: Optional[int] = Input(
            description="The same seed gives the same answer again when temperature is above 0. Empty: random.",
            default=None,
            ge=0,
            le=9223372036854775807,
        ),
        json_schema: Optional[str] = Input(
            description='A JSON schema that the answer will follow, such as {"type": "object", "properties": {"op": {"enum": ["COUNT", "AVG"]}}, "required": ["op"]}.',  # noqa: E501
            default=None,
        ),
        regex: Optional[str] = Input(
            description="A regular expression that the whole answer will match, such as [A-Z]{3}-[0-9]+.", default=None
        ),
        choices: Optional[str] = Input(
            description='The only possible answers, as a JSON list, such as ["yes", "no"].', default=None
        ),
        grammar: Optional[str] = Input(
            description='A grammar that the answer will follow, in EBNF, such as root ::= "SELECT " [a-z]+.',
            default=None,
        ),
        tools: Optional[str] = Input(
            description='Functions that the model may call, as a JSON list of {"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}. For models whose chat template knows tools.',  # noqa: E501
            default=None,
        ),
        thinking: Optional[bool] = Input(
            description="Whether to reason before answering, for models that can do both. Empty: as the model would.",
            default=None,
        ),
        min_tokens: int = Input(
            description="The fewest tokens to generate before the answer may end.", default=0, ge=0, le=131072
        ),
        repetition_penalty: float = Input(
            description="Above 1, tokens already in the prompt or the answer become less likely.",
            default=1.0,
            ge=0.1,
            le=5.0,
        ),
        presence_penalty: float = Input(
            description="Above 0, tokens already in the answer become less likely, however often they came.",
            default=0.0,
            ge=-2.0,
            le=2.0,
        ),
        frequency_penalty: float = Input(
            description="Above 0, tokens become less likely with each time they came in the answer.",
            default=0.0,
            ge=-2.0,
            le=2.0,
        ),
        logit_bias: Optional[str] = Input(
            description='Makes tokens more or less likely, by -100 to 100: a JSON object from a token, as text or id, to its bias, such as {"yes": 5}.',  # noqa: E501
            default=None,
        ),
        logprobs: Optional[int] = Input(
            description="Report each token's log-probability, and of this many of the most likely tokens in its place, in the metrics. Empty: none.",  # noqa: E501
            default=None,
            ge=0,
            le=20,
        ),
    ) -> ConcatenateIterator[str]:
        """Stream an answer."""
        inputs = dict(locals())  # the inputs alone, as nothing else has a name yet
        del inputs["self"]
        from cogpress.cog.streaming import stream

        answer = await self.server.answer(inputs, self.scope.record_metric)
        return stream(answer)  # type: ignore[return-value]
