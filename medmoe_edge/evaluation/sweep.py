"""Every expert of every layer made to run, in the engine that will run it: is its output finite?

An expert that calibration never reached can be broken for years before some image is routed to it.
Here the router is replaced so that all tokens go to one expert, in all layers at once, and E runs
reach every expert.
"""

from collections.abc import Mapping

import numpy as np

from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.config import ModelConfig
from medmoe_edge.runtimes.base import Floats, Step
from medmoe_edge.runtimes.ort.runtime import OrtRuntime

TOKENS = 24
FORCE = np.float32(1e4)  # of logits: the softmax is 1 for the forced expert, and 0 for all others


def sweep_experts(bundle: Bundle) -> list[str]:
    """Parts of the bundle whose output is not finite on random input; empty where all is well.

    Experts are named as in the manifest, with what they serve where that is known; a fault that
    every expert shows is not theirs. Where an expert has several, the first layer is told: what
    follows it cannot be seen.
    """
    generator = np.random.default_rng(0)
    runtime = OrtRuntime(bundle)
    side = bundle.config.vision.image_size
    picture = generator.standard_normal((1, 3, side, side), np.float32)
    faults = [] if np.isfinite(runtime.encode_image(picture)).all() else ["vision"]
    prompt = _random_prompt(runtime, generator)
    logits = _run(bundle, prompt, {}).logits  # the routers as they are
    experts = range(bundle.config.moe.num_experts if bundle.config.moe else 0)
    faulty = {}
    for expert in experts:
        step = _run(bundle, prompt, _routers_to(bundle.config, expert))
        layer = _first_fault(step, expert)
        if layer is not None:
            faulty[expert] = layer
    common = len(experts) > 1 and len(faulty) == len(experts) and len({*faulty.values()}) == 1
    if common or (not faulty and not np.isfinite(logits).all()):
        return [*faults, "decoder"]
    return faults + [_name(bundle.config, layer, expert) for expert, layer in faulty.items()]


def _random_prompt(runtime: OrtRuntime, generator: np.random.Generator) -> Floats:
    """Random tokens, then random vectors of their size where an image would stand, `[S, D]`."""
    vocabulary = runtime.config.decoder.vocab_size
    tokens = runtime.embed(generator.integers(0, vocabulary, TOKENS).tolist())
    return np.concatenate((tokens, generator.permuted(tokens, axis=0)))


def _run(bundle: Bundle, prompt: Floats, replaced: Mapping[str, Floats]) -> Step:
    runtime = OrtRuntime(bundle, replaced)  # one decoder in memory at a time
    return runtime.step(prompt, runtime.new_cache(len(prompt)))


def _routers_to(config: ModelConfig, expert: int) -> Mapping[str, Floats]:
    """Weights that send every token to one expert.

    A router without a bias gets one through the norm before it, whose first channel is held at 1.
    """
    assert config.moe is not None
    size, experts = config.decoder.hidden_size, config.moe.num_experts
    bias = np.zeros(experts, np.float32)
    bias[expert] = FORCE
    if config.moe.router_bias:
        return {f"decoder.layers.{layer}.ffn.router.bias": bias for layer in config.moe_layers}
    first = np.eye(1, size, dtype=np.float32)  # [1, D]: 1 in the first channel
    norm = "input_norm" if config.decoder.kind == "phi" else "post_norm"
    return {
        f"decoder.layers.{layer}.{name}": array
        for layer in config.moe_layers
        for name, array in (
            (f"{norm}.weight", 1 - first[0]),
            (f"{norm}.bias", first[0]),
            ("ffn.router.weight", first.T * bias),
        )
    }


def _first_fault(step: Step, expert: int) -> int | None:
    """The first MoE layer (0..M-1) that the expert spoils or was not reached in, if there is one.

    A layer's output is seen in the next layer's router logits, and the last one's in the logits.
    """
    reached = (step.router_logits.argmax(-1) == expert).all(0)  # [M]
    for layer, well in enumerate(reached):
        last = layer + 1 == len(reached)
        after = step.logits if last else step.router_logits[:, layer + 1]
        if not (well and np.isfinite(after).all()):
            return layer
    return None


def _name(config: ModelConfig, layer: int, expert: int) -> str:
    assert config.moe is not None
    name = f"decoder.layers.{config.moe_layers[layer]}.ffn.experts.{expert}"
    return f"{name} ({config.moe.expert_names[expert]})" if config.moe.expert_names else name
