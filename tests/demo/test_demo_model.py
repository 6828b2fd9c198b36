"""The transformer: shapes, RoPE's geometry, and that it can learn."""

import torch

from flexsparse.demo.model import VideoDiT, apply_rope, rope_angles


def _model() -> VideoDiT:
    torch.manual_seed(0)
    model = VideoDiT(dim=32, depth=2, heads=2, patch=4, mlp_ratio=2)
    for parameter in model.parameters():  # the zero initialisation would hide most of the network
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_velocity_has_the_shape_of_its_input_and_gradients_reach_everything():
    model = _model()
    video = torch.randn(2, 3, 3, 8, 12)
    velocity = model(video, torch.tensor([0.3, 0.8]))
    assert velocity.shape == video.shape
    velocity.square().mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_starts_from_a_clean_estimate_of_zero():
    video = torch.randn(1, 3, 2, 16, 16)
    velocity = VideoDiT(dim=32, depth=1, heads=2)(video, torch.tensor([0.5]))
    torch.testing.assert_close(velocity, video / 0.5)


def test_samples_are_independent():
    model, video, t = _model(), torch.randn(2, 3, 2, 8, 8), torch.tensor([0.2, 0.9])
    torch.testing.assert_close(model(video, t)[1:], model(video[1:], t[1:]), atol=1e-5, rtol=1e-5)


def test_rope_scores_depend_on_offsets_only():
    grid, head_dim = (3, 4, 5), 16
    angles = rope_angles(grid, head_dim, torch.device("cpu"))
    q, k = torch.randn(2, head_dim)
    rotated_q, rotated_k = (
        apply_rope(x.expand(1, 1, 60, head_dim), angles.cos(), angles.sin())[0, 0].view(*grid, head_dim) for x in (q, k)
    )
    score = (rotated_q[0, 1, 1] * rotated_k[1, 2, 3]).sum()
    moved = (rotated_q[1, 2, 2] * rotated_k[2, 3, 4]).sum()
    elsewhere = (rotated_q[0, 1, 1] * rotated_k[1, 2, 2]).sum()
    torch.testing.assert_close(score, moved)
    assert (score - elsewhere).abs() > 1e-4
