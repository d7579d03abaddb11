"""The local denoiser against loops over pixels in float64, and against the exact denoiser of the training set."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from common import one_line, same_t, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import tinyhall as th
from tinyhall.core._check import TinyhallError
from tinyhall.core.schedule import Schedule
from tinyhall.data.local import LocalDenoiser, PatchFit, fit_patch

SCHEDULE = Schedule.cosine(100)


def images(n: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, *shape, generator=seeded(seed)) * 2 - 1


def states(y: torch.Tensor, t: int, n: int = 2) -> torch.Tensor:
    g = seeded(5)
    x0 = y[torch.randint(len(y), (n,), generator=g)]
    return SCHEDULE.q_sample(x0, torch.full((n,), t), torch.randn(x0.shape, generator=g))


def patch_at(image: np.ndarray, row: int, column: int, patch: int, border: str) -> dict[tuple[int, int], np.ndarray]:
    """The pixels around a place, by their offset, each once; without those beyond a border."""
    _, height, width = image.shape
    out, seen = {}, set()
    for dy in range(-(patch // 2), patch // 2 + 1):
        for dx in range(-(patch // 2), patch // 2 + 1):
            y, x = row + dy, column + dx
            if border == "circular":
                y, x = y % height, x % width
            if (y, x) not in seen and 0 <= y < height and 0 <= x < width:
                out[dy, dx] = image[:, y, x]
                seen.add((y, x))
    return out


def by_loops(y: torch.Tensor, x: torch.Tensor, t: int, patch: int, equivariant: bool, border: str) -> np.ndarray:
    """Equations 7 to 10 and 41 word for word."""
    bar = math.exp(float(SCHEDULE.log_alpha_bar[t]))
    data, out = y.double().numpy(), np.empty(x.shape)
    _, _, height, width = data.shape
    places = [(row, column) for row in range(height) for column in range(width)]
    for s, state in enumerate(x.double().numpy()):
        for row, column in places:
            here = patch_at(state, row, column, patch, border)
            logs, centres = [], []
            for image in data:
                for other in places if equivariant else [(row, column)]:
                    there = patch_at(image, *other, patch, border)
                    if there.keys() == here.keys():
                        gap = sum(((here[k] - math.sqrt(bar) * there[k]) ** 2).sum() for k in here)
                        logs.append(-gap / (2 * (1 - bar)))
                        centres.append(image[(slice(None), *other)])
            weight = np.exp(np.array(logs) - max(logs))
            mean = (weight[:, None] * np.array(centres)).sum(0) / weight.sum()
            out[s, :, row, column] = (state[:, row, column] - math.sqrt(bar) * mean) / math.sqrt(1 - bar)
    return out


@pytest.mark.parametrize("border", ["zeros", "circular"])
@pytest.mark.parametrize(
    ("shape", "patch", "equivariant"),
    [
        ((1, 6, 6), 1, False), ((1, 6, 6), 3, False), ((3, 5, 7), 5, False), ((2, 7, 4), 5, False),
        ((1, 5, 5), 1, True), ((1, 5, 5), 3, True), ((2, 4, 6), 3, True), ((1, 3, 6), 5, True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("t", [0, 40, 99])
def test_equals_loops(shape: tuple[int, ...], patch: int, equivariant: bool, border: str, t: int) -> None:
    y = images(5, *shape)
    x = states(y, t)
    expected = by_loops(y, x, t, patch, equivariant, border)
    for dtype, close in ((torch.float32, 2e-4), (torch.float64, 1e-11)):
        net = LocalDenoiser(y, SCHEDULE, patch, equivariant=equivariant, border=border, dtype=dtype)
        got = net(x.to(dtype), same_t(t, len(x)))
        assert got.dtype == dtype
        np.testing.assert_allclose(got.numpy(), expected, atol=close)


def empirical(y: torch.Tensor, x: torch.Tensor, t: int) -> torch.Tensor:
    """E[eps | x_t] if the data are these images: one weight an image."""
    bar = SCHEDULE.alpha_bar[t]
    eps = (x.double()[:, None] - bar.sqrt() * y.double()) / (1 - bar).sqrt()  # [states, images, ...]
    log_w = -0.5 * eps.flatten(2).square().sum(2)
    return torch.einsum("sn,snchw->schw", log_w.softmax(1), eps)


@pytest.mark.parametrize("border", ["zeros", "circular"])
@pytest.mark.parametrize(("shape", "patch"), [((1, 8, 8), 8), ((1, 8, 8), 9), ((3, 6, 4), 6), ((2, 3, 5), 1001)])
def test_a_patch_as_wide_as_the_image_is_the_exact_denoiser(shape: tuple[int, ...], patch: int, border: str) -> None:
    y = images(40, *shape)
    net = LocalDenoiser(y, SCHEDULE, patch, border=border)
    for t in (0, 30, 70, 99):
        x = states(y, t, 3)
        torch.testing.assert_close(net(x, same_t(t, 3)).double(), empirical(y, x, t), rtol=0, atol=1e-4)


def test_in_a_circle_it_is_that_of_all_translates() -> None:
    y = images(6, 1, 4, 5)
    moved = torch.cat([y.roll((a, b), (2, 3)) for a in range(4) for b in range(5)])
    net = LocalDenoiser(y, SCHEDULE, 5, equivariant=True, border="circular")
    x = states(y, 50)
    torch.testing.assert_close(net(x, same_t(50, 2)).double(), empirical(moved, x, 50), rtol=0, atol=1e-4)


def test_the_whole_image_in_view_repeats_the_training_set() -> None:
    y = images(20, 1, 8, 8)
    x = th.sample(LocalDenoiser(y, SCHEDULE, 8), SCHEDULE, 6, sampler=th.ddpm("small"), generator=seeded(1)).x
    assert float((x[:, None] - y).abs().amax((2, 3, 4)).amin(1).max()) < 1e-3


def test_a_small_patch_makes_new_images_of_old_pixels() -> None:
    """Theorem 4.1: every pixel is the centre of some patch of the training set, here one of -1 and 1."""
    y = images(20, 1, 8, 8).sign()
    x = th.sample(LocalDenoiser(y, SCHEDULE, 3), SCHEDULE, 6, sampler=th.ddpm("small"), generator=seeded(1)).x
    assert float((x.abs() - 1).abs().max()) < 1e-3
    assert float((x[:, None] - y).abs().amax((2, 3, 4)).amin(1).min()) > 1


@settings(max_examples=25)
@given(chunk=st.integers(1, 12), seed=st.integers(0, 20), equivariant=st.booleans())
def test_neither_blocks_nor_order_change_the_result(chunk: int, seed: int, equivariant: bool) -> None:
    y = images(10, 2, 6, 5)
    x, t = states(y, 30), same_t(30, 2)
    whole = LocalDenoiser(y, SCHEDULE, 3, equivariant=equivariant)(x, t)
    shuffled = y[torch.randperm(10, generator=seeded(seed))]
    torch.testing.assert_close(
        LocalDenoiser(shuffled, SCHEDULE, 3, equivariant=equivariant, chunk=chunk)(x, t), whole, rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        LocalDenoiser(shuffled, SCHEDULE, 6, chunk=chunk)(x, t), LocalDenoiser(y, SCHEDULE, 6)(x, t), rtol=0, atol=1e-5
    )


def test_an_image_twice_counts_twice_and_a_set_of_equals_as_one() -> None:
    y = images(3, 1, 6, 6)
    x, t = states(y, 60), same_t(60, 2)
    one = LocalDenoiser(y, SCHEDULE, 3)(x, t)
    torch.testing.assert_close(LocalDenoiser(y.repeat(4, 1, 1, 1), SCHEDULE, 3, chunk=5)(x, t), one, rtol=0, atol=1e-5)
    assert float((LocalDenoiser(torch.cat([y, y[:1]]), SCHEDULE, 3)(x, t) - one).abs().max()) > 1e-3


def test_a_pixel_asks_only_for_its_patch() -> None:
    y = images(10, 1, 9, 9)
    x = states(y, 30, 1)
    other = x.clone()
    other[0, 0, :, 6:] += 1
    net, t = LocalDenoiser(y, SCHEDULE, 5), same_t(30, 1)
    changed = (net(x, t) != net(other, t))[0, 0].any(0)
    assert changed.tolist() == 4 * [False] + 5 * [True]


def test_a_state_is_answered_alone_and_mixed_t_like_one_t() -> None:
    y = images(10, 1, 6, 6)
    t = torch.tensor([3, 90, 3, 50])
    x = torch.cat([states(y, int(one), 1) for one in t])
    net = LocalDenoiser(y, SCHEDULE, lambda t: 3 if t < 50 else 6)
    alone = [LocalDenoiser(y, SCHEDULE, 3 if one < 50 else 6)(x[i : i + 1], same_t(int(one), 1)) for i, one in enumerate(t)]
    torch.testing.assert_close(net(x, t), torch.cat(alone), rtol=0, atol=1e-6)


@pytest.mark.parametrize("patch", [1, 3, 8])
def test_finite_where_the_noise_is_all_or_next_to_nothing(patch: int) -> None:
    bar = torch.linspace(math.log(1 - 1e-9), math.log(1e-40), 30, dtype=torch.float64).exp()
    schedule = Schedule.from_alpha_bar(bar)
    y = images(10, 1, 8, 8)
    net = LocalDenoiser(y, schedule, patch)
    for x in (y[:3], torch.randn(3, 1, 8, 8, generator=seeded()), torch.full((3, 1, 8, 8), 1e6)):
        for t in range(30):
            assert bool(torch.isfinite(net(x, same_t(t, 3))).all())
    noise = torch.randn(3, 1, 8, 8, generator=seeded())
    torch.testing.assert_close(net(noise, same_t(29, 3)), noise, rtol=0, atol=1e-6)  # nothing is left of the image


def test_has_no_gradient_and_keeps_a_type() -> None:
    y = images(4, 1, 6, 6)
    net = LocalDenoiser(y.requires_grad_(), SCHEDULE, 3)
    x = states(y.detach(), 40).requires_grad_()
    assert not net(x, same_t(40, 2)).requires_grad
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert net(x.to(dtype), same_t(40, 2)).dtype == dtype
        assert net(x.to(dtype), torch.tensor([40, 41])).dtype == dtype


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor holds that was made anew."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.known, self.numbers = {k.untyped_storage().data_ptr() for k in known}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.numbers = max(self.numbers, tensor.numel())
        return out


@pytest.mark.parametrize("equivariant", [False, True])
@pytest.mark.parametrize("patch", [3, 8])
def test_memory_is_that_of_a_block_of_images(patch: int, equivariant: bool) -> None:
    y = images(40, 1, 8, 8)
    net = LocalDenoiser(y, SCHEDULE, patch, chunk=10, equivariant=equivariant)
    x, t = states(y, 30, 3), same_t(30, 3)
    with Largest(net.images) as seen:
        net(x, t)
    assert seen.numbers == 10 * 64
    assert net.images.data_ptr() == y.data_ptr()  # the training set is not copied


def test_the_patch_of_a_network_is_found() -> None:
    """Local denoisers stand for networks: their own P comes out, and an error of 0."""
    y = images(30, 1, 8, 8)
    local = LocalDenoiser(y, SCHEDULE, 8)
    net = local.at(lambda t: 3 if t < 40 else 5)
    t = torch.tensor([60, 60, 20, 20, 20])
    x = torch.cat([states(y, 60), states(y, 20, 3)])
    fit = fit_patch(net, local, x, t, [1, 3, 5, 8])
    assert fit.t.tolist() == [20, 60]
    assert fit.patch.tolist() == [3, 5]
    assert fit.error.shape == (2, 4)
    assert float(fit.error[0, 1]) == pytest.approx(0, abs=1e-6)
    assert float(fit.error[0, 0]) > 1e-4
    assert [fit(one) for one in (0, 20, 39, 41, 99)] == [3, 3, 3, 5, 5]
    assert isinstance(fit, PatchFit)
    torch.testing.assert_close(local.at(fit)(x, t), net(x, t))
    # By hand: 1 - cosine, mean over the states of t = 20.
    theirs, ours = net(x[2:], t[2:]).flatten(1).numpy(), local.at(1)(x[2:], t[2:]).flatten(1).numpy()
    cosine = (theirs * ours).sum(1) / np.linalg.norm(theirs, axis=1) / np.linalg.norm(ours, axis=1)
    assert float(fit.error[0, 0]) == pytest.approx(1 - cosine.mean(), abs=1e-5)


@pytest.mark.gpu
def test_a_gpu_answers_alike() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    y = images(10, 2, 6, 5)
    x, t = states(y, 30), same_t(30, 2)
    for patch, equivariant in ((3, False), (3, True), (6, False)):
        net = LocalDenoiser(y, SCHEDULE, patch, equivariant=equivariant)
        expected = net(x, t)
        torch.testing.assert_close(net(x.cuda(), t.cuda()).cpu(), expected, rtol=0, atol=1e-4)


Y = images(4, 1, 6, 6)
T2 = same_t(3, 2)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: LocalDenoiser(Y[0], SCHEDULE, 3), ("images", "[n, ., ., .]", "(1, 6, 6)")),
        (lambda: LocalDenoiser(Y[:0], SCHEDULE, 3), ("images", "n >= 1", "(0, 1, 6, 6)")),
        (lambda: LocalDenoiser(Y.double(), SCHEDULE, 3), ("images", "float32", "float64")),
        (lambda: LocalDenoiser(Y / 0, SCHEDULE, 3), ("images", "finite", "144")),
        (lambda: LocalDenoiser(Y, SCHEDULE, 4), ("patch", "odd whole number, or at least 6", "4 (int)")),
        (lambda: LocalDenoiser(Y, SCHEDULE, 0), ("patch", "odd", "0")),
        (lambda: LocalDenoiser(Y, SCHEDULE, True), ("patch", "odd", "True (bool)")),
        (lambda: LocalDenoiser(Y, SCHEDULE, 3.0), ("patch", "odd", "3.0 (float)")),
        (lambda: LocalDenoiser(Y, SCHEDULE, 3).at(2), ("patch", "odd", "2")),
        (lambda: LocalDenoiser(Y, SCHEDULE, lambda t: t + 1)(Y[:2], T2), ("patch", "odd", "4")),
        (lambda: LocalDenoiser(Y, SCHEDULE, 3, border="reflect"), ("border", "'zeros' or 'circular'", "'reflect'")),
        (lambda: LocalDenoiser(Y, SCHEDULE, 3, chunk=0), ("chunk", "at least 1", "0")),
        (lambda: LocalDenoiser(Y, SCHEDULE, 3, dtype=torch.float16), ("dtype", "torch.float64", "torch.float16")),
        (lambda: LocalDenoiser(Y, SCHEDULE, 3)(torch.zeros(2, 1, 6, 5), T2), ("x", "[n, 1, 6, 6]", "(2, 1, 6, 5)")),
        (lambda: LocalDenoiser(Y, SCHEDULE, 3)(Y[:2], same_t(3, 3)), ("t", "[2]", "(3,)")),
        (lambda: LocalDenoiser(Y, SCHEDULE, 3)(Y[:2], same_t(100, 2)), ("t", "0..99", "100")),
        (lambda: LocalDenoiser(Y, SCHEDULE, 3)(Y[:2], torch.tensor([3, -1])), ("t", "0..99", "-1")),
        (lambda: LocalDenoiser(Y, SCHEDULE, 3)(Y[:2], T2, T2), ("label", "None", "(2,)")),
        (lambda: fit_patch(LocalDenoiser(Y, SCHEDULE, 3), LocalDenoiser(Y, SCHEDULE, 3), Y[:2], T2, []), ("patches", "one P")),
        (lambda: fit_patch(lambda x, t: x[:1], LocalDenoiser(Y, SCHEDULE, 3), Y[:2], T2, [3]), ("net", "eps", "(1, 1, 6, 6)")),
    ],
)
def test_errors(make, parts, unchecked) -> None:
    with pytest.raises(TinyhallError) as caught:
        make()
    one_line(caught.value, *parts)
