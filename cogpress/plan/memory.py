"""Memory of training and serving by part, in bytes, as pure arithmetic with a source for each formula.

Constants that are assumed rather than derived say so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from cogpress.plan.architecture import Architecture
from cogpress.train.layouts import TILE_BYTES
from cogpress.verify.distributions import BATCH_TOKENS

Method = Literal["full", "lora", "int8", "nf4"]
"""Full fine-tuning, LoRA on 16-bit weights, LoRA on 8-bit weights (LLM.int8()), and QLoRA."""

Scheme = Literal["float32", "bfloat16", "float16", "int8", "int4", "fp8", "awq"]
"""How served weights are stored: a dtype, or a scheme of scripts/quantize."""

METHODS: tuple[Method, ...] = ("full", "lora", "int8", "nf4")
TYPES = {"float32": 4, "bfloat16": 2, "float16": 2}

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Bits per weight in NF4 with double quantization: 4, plus an 8-bit constant per 64 weights and a 32-bit constant per
256 of those (Dettmers et al. 2023, section 3)."""

ADAM_8BIT = 2 * (1 + 4 / 256)
"""Bytes per parameter of AdamW's two 8-bit states, with a 32-bit constant per block (Dettmers et al. 2022; blocks of
256 in bitsandbytes)."""

BLOCK = 16
"""Tokens per block of vLLM's KV cache (Kwon et al. 2023; vLLM's default)."""

CUDA_CONTEXT = 0.6e9
"""Bytes of a process's CUDA context and its libraries on each GPU. Assumed; vLLM calls it non-torch memory."""

CUDA_GRAPHS = 0.8e9
"""Bytes of vLLM's captured graphs on each GPU. Assumed, from its usual logs."""

FRAGMENTATION = 0.04
"""Memory that PyTorch's allocator loses to fragmentation, as a share of what training allocates. Assumed."""

HOST_PROCESS = 3e9
"""Bytes of host memory of a process that uses a GPU: Python, PyTorch and CUDA's libraries. Assumed."""

CPU_PROCESSES = 2e9
"""Bytes of host memory of the API's and the engine's process on a CPU, without weights and KV cache. Rounded up from
1.5e9, of vLLM's CPU build with the embedded base after 16 predictions at once."""

IN_TRANSIT = 4
"""Tensors in host memory at once on their way between files and a GPU: transformers 5 loads with four threads, and the
merge computes one tensor while others wait to be written."""


@dataclass(frozen=True)
class Training:
    """All of a training that decides its memory.

    Attributes:
        method: what is trained, and how the base is stored.
        batch: rows per forward pass, without accumulation.
        length: tokens per row, including padding.
        rank: of the adapter; unused for `full`.
        targets: layers with an adapter, as in `train.target_modules`.
        accumulation: batches per optimizer step; from the second on, the earlier gradients are in memory.
        checkpointing: whether activations are recomputed in the backward pass.
        optimizer: AdamW with 32-bit or 8-bit states.
        fused: whether attention avoids storing its scores (sdpa) or stores them (eager).
        answers: share of tokens with loss; only these have logits.
        frame: bytes that the process uses before a model is loaded.
    """

    method: Method = "nf4"
    batch: int = 8
    length: int = 1024
    rank: int = 16
    targets: str = "all-linear"
    accumulation: int = 1
    checkpointing: bool = True
    optimizer: Literal["adamw", "paged_adamw_8bit"] = "paged_adamw_8bit"
    fused: bool = True
    answers: float = 1.0
    frame: float = CUDA_CONTEXT


@dataclass(frozen=True)
class Serving:
    """All of a serving setup that decides its memory on each of `gpus`.

    Attributes:
        scheme: how the weights are stored.
        context: tokens per sequence, prompt and answer.
        concurrency: number of sequences at once.
        cache_bytes: bytes per value in the KV cache; 1 for FP8.
        gpus: number of GPUs that share weights and heads (tensor parallelism, Shoeybi et al. 2019).
        batched: tokens per forward pass (vLLM's max_num_batched_tokens).
        compiled: whether graphs are captured.
        frame: bytes that the process uses before a model is loaded.
    """

    scheme: Scheme = "bfloat16"
    context: int = 4096
    concurrency: int = 32
    cache_bytes: int = 2
    gpus: int = 1
    batched: int = 8192
    compiled: bool = True
    frame: float = CUDA_CONTEXT


@dataclass(frozen=True)
class Memory:
    """Bytes by part."""

    weights: float = 0
    gradients: float = 0
    optimizer: float = 0
    activations: float = 0
    logits: float = 0
    cache: float = 0
    overhead: float = 0

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return sum(vars(self).values())


def host_of_training(model: Architecture, how: Training) -> float:
    """Bytes of host memory that training on a GPU takes, with the merge and the comparison after it.

    Weights are read from mapped files, whose pages the system can drop, and pass through the host a few tensors at a
    time. The comparison keeps a batch of log-probabilities there, in 32 bits. A tar is packed as a stream.
    """
    compared = 4.0 * max(BATCH_TOKENS, how.length) * model.vocabulary
    return HOST_PROCESS + max(IN_TRANSIT * largest_tensor(model), compared)


def host_of_serving(model: Architecture, how: Serving) -> float:
    """Bytes of host memory that serving on GPUs takes: processes for the API, the engine and each GPU of several.

    Each that has a GPU loads a tensor at a time.
    """
    workers = how.gpus if how.gpus > 1 else 0
    return HOST_PROCESS * (2 + workers) + how.gpus * largest_tensor(model)


def host_of_serving_on_cpu(weights: float, cache: float) -> float:
    """Bytes of host memory that serving on a CPU takes.

    Args:
        weights: bytes of the weights' files, from whose type the engine may compute in 32 bits instead of 16.
        cache: bytes of the KV cache, which is set aside whole.
    """
    return CPU_PROCESSES + 2 * weights + cache


def largest_tensor(model: Architecture) -> float:
    """Bytes of the largest tensor in a checkpoint, at most: an embedding, a layer, or the experts of a layer."""
    layers = [one.inputs * one.outputs for one in model.linears]
    return TYPES.get(model.dtype, 2) * max(model.embedding, model.head, model.experts / max(1, model.layers), *layers)


def training(model: Architecture, how: Training) -> Memory:
    """The peak of a training step: the larger of two moments.

    Between forward and backward pass all saved activations are in memory, and beside them the larger of two: the logits
    with their gradients, or one layer's gradients, workspace and (with checkpointing) recomputed activations. Unless
    batches are accumulated, only the output layer has a gradient at that moment; an adapter's gradients are counted
    nonetheless, as they are small.

    At the end of the backward pass all gradients are in memory, and the activations of one layer.
    """
    trained = model.parameters if how.method == "full" else model.adapter(how.rank, how.targets)
    tokens = how.batch * how.length
    saved = saved_by_layer(model, how) * tokens
    boundary = (4 if how.method == "full" else 2) * model.hidden * tokens
    kept = boundary * model.layers if how.checkpointing else saved * model.layers
    if how.method == "full" and not how.checkpointing:
        kept += cast_weights(model)
    passing = workspace(model, how) + (saved if how.checkpointing else 0)
    scores = logits(model, tokens * how.answers)
    # Autocast keeps trained parameters in 32 bits, and gradients have their parameter's dtype.
    gradients = 4.0 * trained
    first = 4.0 * model.vocabulary * model.hidden if how.method == "full" and how.accumulation == 1 else gradients
    last = workspace(model, how) + saved
    moments = [(first, kept + max(0.0, passing - scores), scores), (gradients, last, 0.0)]
    gradients, activations, scores = max(moments, key=sum)
    return Memory(
        weights=training_weights(model, how.method) + (0 if how.method == "full" else 4 * trained),
        gradients=gradients,
        # First and second moment (Kingma and Ba 2015).
        optimizer=trained * (8 if how.optimizer == "adamw" else ADAM_8BIT),
        activations=activations,
        logits=scores,
        overhead=how.frame + FRAGMENTATION * (activations + scores),
    )


def training_weights(model: Architecture, method: Method) -> float:
    """The base model's weights in training.

    Full fine-tuning under autocast has 32-bit weights (with gradients and AdamW's moments 16 bytes per parameter, as
    Rajbhandari et al. 2020, section 3.1, count for mixed precision). bitsandbytes quantizes linear layers and leaves
    embeddings, output layer, norms and fused experts in 16 bits; LLM.int8() (Dettmers et al. 2022) keeps one 32-bit
    constant per output.
    """
    if method == "full":
        return 4.0 * model.parameters
    if method == "lora":
        return 2.0 * model.parameters
    held = [linear for linear in model.linears if linear.quantizable]
    small = sum(linear.weights for linear in held)
    rest = 2.0 * (model.parameters - small)
    if method == "int8":
        return rest + small + 4 * sum(linear.outputs * linear.count for linear in held)
    return rest + small * NF4_BITS / 8


def saved_by_layer(model: Architecture, how: Training) -> float:
    """Bytes per token that one layer saves for the backward pass, without checkpointing.

    Derived as in Korthikanti et al. 2022, section 4.1, for what cogpress runs: pre-norm layers with RMS norms, 16-bit
    products, frozen weights beside an adapter.

    - Two norms compute in 32 bits and save their input, and trained ones their output too: 4h each.
    - Each layer with trained weights saves its own 16-bit copy of its input, and an adapter the r values between A and
      B. The product with a frozen weight saves nothing.
    - Attention saves queries, its output, and keys and values repeated for each query head; unless it is fused, also
      the softmax in 32 and in 16 bits.
    - The feed-forward network saves the input of its nonlinearity and the factors of its gate.
    """
    full = how.method == "full"
    layers = max(1, model.layers)
    wide = model.heads * model.head_width
    norms = 2 * (8 if full else 4) * model.hidden
    trained = model.linears if full else model.targeted(how.targets)
    inputs = 2 * sum(linear.inputs * linear.count for linear in trained) / layers
    between = 0 if full else 2 * how.rank * sum(linear.count for linear in trained) / layers
    attention = 2 * 4 * wide + 4 * model.heads
    if not how.fused:
        attention += 6 * model.heads * how.length
    forward = 2 * (3 if model.gated else 1) * model.intermediate
    if model.experts and full:
        inputs += 2 * (model.hidden + model.intermediate)
    return norms + inputs + between + attention + forward


def workspace(model: Architecture, how: Training) -> float:
    """Temporary memory of one layer's backward pass.

    The gradients of the feed-forward network's three tensors in 16 bits, and of the 32-bit copy of its input to an
    adapter; those of unfused scores in 32 and 16 bits; and the largest quantized layer, dequantized.
    """
    tokens = how.batch * how.length
    gradients = (2 * (3 if model.gated else 2) + 4) * model.intermediate * tokens
    scores = 0 if how.fused else 10 * model.heads * how.length * tokens
    largest = max((linear.inputs * linear.outputs for linear in model.linears), default=0)
    quantized = 2 * largest if how.method in ("nf4", "int8") else 0
    return float(max(gradients, scores) + quantized)


def cast_weights(model: Architecture) -> float:
    """The 16-bit copies of 32-bit weights that autocast makes for the forward pass and keeps for the backward pass."""
    return 2.0 * (model.linear_weights + model.experts)


def logits(model: Architecture, tokens: float) -> float:
    """Logits of tokens with loss and their gradient in 16 bits, and two tiles of them in 32 bits.

    `train.objective` computes logits for answers only, and their loss and gradient tile by tile.
    """
    return 4.0 * model.vocabulary * tokens + 2 * min(TILE_BYTES, 4.0 * model.vocabulary * tokens)


def checkpoints(model: Architecture, how: Training, room: float) -> bool:
    """Whether a training has to compute activations again to fit into so many bytes; a tenth is left for what the plan
    does not know."""
    return training(model, replace(how, checkpointing=False)).total > 0.9 * room


def serving_weights(model: Architecture, scheme: Scheme) -> float:
    """Served weights: linear layers by scheme, the rest in 16 bits (as `quantize` and compressed-tensors store them).

    `int8` and `fp8` have one 16-bit scale per output; `int4` has one per group of 128 inputs, or 64 or 32 if 128 does
    not divide the layers; `awq` adds a 4-bit zero point per group.
    """
    if scheme in TYPES:
        return float(TYPES[scheme] * model.parameters)
    small = model.linear_weights + model.experts
    rest = 2.0 * (model.parameters - small)
    if scheme in ("int8", "fp8"):
        return rest + small + 2 * sum(linear.outputs * linear.count for linear in model.linears)
    group = next((size for size in (128, 64, 32) if all(one.inputs % size == 0 for one in model.linears)), 32)
    return rest + small * (0.5 + (2.5 if scheme == "awq" else 2) / group)


def cache_of_sequence(model: Architecture, tokens: int, cache_bytes: int = 2) -> float:
    """The KV cache of one sequence: each layer's values per token, in whole blocks, at most a window of them.

    A window may start anywhere in a block, so it touches one block more (as in vLLM's SlidingWindowSpec).
    """
    total = 0.0
    for layer in model.caches:
        blocks = math.ceil(tokens / BLOCK)
        if layer.window is not None:
            blocks = min(blocks, math.ceil((layer.window - 1) / BLOCK) + 1)
        total += blocks * BLOCK * layer.values * cache_bytes
    return total


def cache(model: Architecture, how: Serving) -> float:
    """The KV cache of all sequences on one GPU.

    Key and value heads are divided among the GPUs; with fewer heads than GPUs, each GPU holds a whole head.
    """
    share = max(1 / how.gpus, 1 / model.key_value_heads)
    return how.concurrency * cache_of_sequence(model, how.context, how.cache_bytes) * share


def pass_activations(model: Architecture, how: Serving) -> float:
    """Peak memory of one forward pass, which vLLM measures at its start and reserves.

    Per token the residual twice and the widest tensors of the feed-forward network (gate and up together, and their
    product), in 16 bits; per sequence the logits once in 16 bits and three times in 32, for the sampler.
    """
    # A pass has at most the tokens of all sequences together.
    tokens = min(how.batched, how.context * how.concurrency)
    widest = max((3 if model.gated else 2) * model.intermediate / how.gpus, 4.0 * model.heads * model.head_width)
    return tokens * 2 * (2 * model.hidden + widest) + how.concurrency * model.vocabulary * 14


def serving(model: Architecture, how: Serving) -> Memory:
    """Memory of each serving GPU: its share of weights and cache, a forward pass, graphs and CUDA context."""
    return Memory(
        weights=serving_weights(model, how.scheme) / how.gpus,
        cache=cache(model, how),
        activations=pass_activations(model, how),
        overhead=how.frame + (CUDA_GRAPHS if how.compiled else 0),
    )


def gigabytes(number: float) -> str:
    """Bytes, formatted in units of 10^9."""
    return f"{number / 1e9:,.2f} GB" if abs(number) < 1e10 else f"{number / 1e9:,.1f} GB"
