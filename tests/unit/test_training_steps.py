"""Between the phases: up-cycling, what learns, and how fast."""

import pytest
import torch
from torch import nn

from medmoe_edge.models.med_moe import MedMoE
from medmoe_edge.presets import PRESETS
from medmoe_edge.training.initialise import new_dense_model
from medmoe_edge.training.loop import (
    Fp32Muon,
    learning_rate_factor,
    make_optimisers,
    prepare_parameters,
    set_learning_rate,
)
from medmoe_edge.training.phases import Objective, upcycle
from medmoe_edge.training.recipe import PhaseConfig

CONFIG = PRESETS["tiny"]
SIZE = CONFIG.decoder.hidden_size


def test_upcycling_keeps_what_the_model_computes() -> None:
    """Experts and meta are the dense feed-forward: with p1 = 1 the layer gives it twice."""
    dense = new_dense_model(CONFIG, 0)
    copies = {layer: dense.decoder.layers[layer].ffn for layer in (0, 2)}
    router = nn.Linear(SIZE, 4)
    nn.init.constant_(router.bias, 0.0)
    router.bias.data[2] = 1e4
    model = upcycle(dense, router, CONFIG)
    assert model.config == CONFIG
    x = torch.randn(2, 5, SIZE)
    for layer, ffn in copies.items():
        assert isinstance(ffn, nn.Module)
        moe, learned = model.moe_layer(layer), ffn.state_dict()
        assert moe.meta is not None
        for expert in [*moe.experts, moe.meta]:
            assert expert is not ffn
            assert learned.keys() == expert.state_dict().keys()
            assert all(torch.equal(learned[k], v) for k, v in expert.state_dict().items())
        assert torch.equal(moe.router.weight, router.weight)
        assert torch.equal(moe.router.bias, router.bias)
        torch.testing.assert_close(moe(x), 2 * ffn(x))
    parameters = list(model.parameters())
    assert len({parameter.data_ptr() for parameter in parameters}) == len(parameters)


def test_the_learning_rate_rises_and_falls() -> None:
    assert learning_rate_factor(0.0, 0.1) == 0.0
    assert learning_rate_factor(0.05, 0.1) == pytest.approx(0.5)
    assert learning_rate_factor(0.1, 0.1) == learning_rate_factor(0.0, 0.0) == 1.0
    assert learning_rate_factor(0.55, 0.1) == pytest.approx(0.5)
    assert learning_rate_factor(1.0, 0.1) == pytest.approx(0.0)


def test_parameters_freeze_by_pattern() -> None:
    objective = Objective(MedMoE(CONFIG), nn.Linear(SIZE, 4), (0, 2))
    phase = PhaseConfig(1, 1.0, ("router.*", "vision.layers.[1-2].fc1.*"), dropout=0.3)
    prepare_parameters(objective, phase)
    learning = {name for name, p in objective.named_parameters() if p.requires_grad}
    tower = "model.vision.layers.1.fc1."
    assert learning == {"router.weight", "router.bias", f"{tower}weight", f"{tower}bias"}
    dropouts = [module for module in objective.modules() if isinstance(module, nn.Dropout)]
    assert [module.p for module in dropouts] == [0.3] * 3


def test_muon_trains_the_decoders_matrices_and_adamw_the_rest() -> None:
    objective = Objective(MedMoE(CONFIG), nn.Linear(SIZE, 4), (0, 2))
    phase = PhaseConfig(1, 0.5, ("*",), tower_rate=0.1, matrix_rate=3.0, weight_decay=0.2)
    prepare_parameters(objective, phase)
    muon, adamw = make_optimisers(objective, phase)
    assert isinstance(muon, torch.optim.Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    names = {parameter: name for name, parameter in objective.named_parameters()}
    groups = {
        names[parameter]: group
        for optimiser in (muon, adamw)
        for group in optimiser.param_groups
        for parameter in group["params"]
    }
    assert groups.keys() == set(names.values())
    assert sum(len(g["params"]) for o in (muon, adamw) for g in o.param_groups) == len(names)
    set_learning_rate([muon, adamw], 0.5)
    expected = {
        "model.decoder.layers.0.ffn.experts.1.up.weight": (muon, 1.5, 0.2),
        "model.decoder.head.weight": (adamw, 0.5, 0.2),
        "model.decoder.norm.bias": (adamw, 0.5, 0.0),
        "model.vision.layers.0.fc1.weight": (adamw, 0.05, 0.2),
        "model.vision.layers.0.fc1.bias": (adamw, 0.05, 0.0),
    }
    for name, (optimiser, rate, decay) in expected.items():
        assert any(groups[name] is group for group in optimiser.param_groups), name
        assert groups[name]["lr"] == pytest.approx(rate)
        assert groups[name]["weight_decay"] == decay


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16)])
def test_muon_in_fp32_does_what_torchs_does(shape: tuple[int, int]) -> None:
    """Held against torch.optim.Muon, whose orthogonalisation is rounded to bf16."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    gradients = [torch.randn(shape, generator=generator) for _ in range(4)]
    results = []
    for kind in (torch.optim.Muon, Fp32Muon):
        parameter = nn.Parameter(start.clone())
        optimiser = kind([parameter], 0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimiser.step()  # type: ignore[no-untyped-call]
        assert set(optimiser.state[parameter]) == {"momentum_buffer"}
        results.append(parameter.detach())
    theirs, ours = (result - start for result in results)
    assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_a_phase_without_decoder_matrices_needs_no_muon() -> None:
    objective = Objective(MedMoE(CONFIG), None, ())
    phase = PhaseConfig(1, 0.5, ("projector.*",))
    prepare_parameters(objective, phase)
    assert [type(optimiser) for optimiser in make_optimisers(objective, phase)] == [
        torch.optim.AdamW
    ]
