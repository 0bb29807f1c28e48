"""SparseGPT, GPTQ, Wanda and rounding against the papers' algorithms, in numpy's float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from bigmodel.compress import prune, solve
from bigmodel.config import Prune
from bigmodel.models import weights


def layer(inputs: int, outputs: int = 24, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and the Gram matrix of inputs that go together, one of which is always zero."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(3 * inputs, inputs)) @ (rng.normal(size=(inputs, inputs)) * 0.1 + np.eye(inputs))
    x[:, inputs // 3] = 0
    return rng.normal(size=(inputs, outputs)).astype(np.float32), x.T @ x


def error(w: np.ndarray, new: Any, gram: np.ndarray) -> float:
    """|| X (W - W') ||^2."""
    gap = w.astype(np.float64) - np.asarray(new, np.float64)
    return float(np.einsum("io,ij,jo->", gap, gram, gap))


def factor(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The upper Cholesky factor of the damped inverse Hessian; which inputs never were anything."""
    dead = np.diag(gram) == 0
    damped = gram + np.diag(np.where(dead, 1.0, 0.01 * np.diag(gram).mean()))
    return np.linalg.cholesky(np.linalg.inv(damped)).T, dead


def sparsegpt(w: np.ndarray, gram: np.ndarray, share: float, nm: tuple[int, int] | None) -> np.ndarray:
    """Frantar and Alistarh 2023, algorithm 1, with B = 128; masks of blocks of 128 inputs, or of M."""
    u, dead = factor(gram)
    w, mask = w.astype(np.float64), np.ones(w.shape, bool)
    w[dead] = 0
    step = nm[1] if nm else 128
    for i in range(len(w)):
        if i % step == 0:
            rows = slice(i, i + step)
            score = np.square(w[rows] / np.diag(u)[rows, None])
            if nm:
                rank = np.argsort(np.argsort(-score, 0, kind="stable"), 0, kind="stable")
                mask[rows] = rank < nm[0]
            else:
                mask[rows] = score >= np.sort(score.ravel())[round(share * score.size)]
        new = np.where(mask[i], w[i], 0)
        w[i + 1 :] -= np.outer(u[i, i + 1 :], (w[i] - new) / u[i, i])
        w[i] = new
    return w


@pytest.mark.parametrize(
    ("inputs", "pattern"),
    [
        (72, "2:4"),
        (264, "2:4"),
        (131, ""),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((128, "2:4"), (96, "1:4"), (160, "4:8"), (210, "2:3"), (192, ""))
        ),
    ],
)
def test_sparsegpt_is_the_published_algorithm(inputs, pattern):
    """The masks of N:M are of the weights as they are when their turn comes; a last block may be smaller."""
    w, gram = layer(inputs)
    nm = tuple(map(int, pattern.split(":"))) if pattern else None
    how = Prune(sparsity=1 - nm[0] / nm[1] if nm else 0.5, pattern=pattern)
    got = np.asarray(jax.jit(solve.sparsegpt, static_argnums=2)(w, gram.astype(np.float32), how))
    expected = sparsegpt(w, gram, 0.5, nm)
    assert error(w, got, gram) == pytest.approx(error(w, expected, gram), rel=2e-3)
    assert ((got == 0) != (expected == 0)).mean() < 2e-3
    if nm:
        zeros = (got == 0).reshape(-1, nm[1], w.shape[1]).sum(1)
        assert (zeros >= nm[1] - nm[0]).all()


def test_a_stack_is_solved_layer_by_layer():
    each = [layer(72, 8, seed) for seed in (1, 2)]
    w, gram = (np.stack(parts) for parts in zip(*each, strict=True))
    how = Prune(sparsity=0.5, pattern="2:4")
    got = jax.jit(solve.sparsegpt, static_argnums=2)(w, gram.astype(np.float32), how)
    for index, (one, its) in enumerate(each):
        assert error(one, got[index], its) == pytest.approx(
            error(one, sparsegpt(one, its, 0.5, (2, 4)), its), rel=2e-3
        )


def gptq(w: np.ndarray, gram: np.ndarray, kind: str, group: int) -> np.ndarray:
    """Frantar et al. 2022: each weight to its nearest code, the later ones make up; in the inputs' order. A
    group's scale is of its weights as they are when its turn comes."""
    u, dead = factor(gram)
    w, levels = w.astype(np.float64), {"int8": 127, "int4": 7}[kind]
    w[dead] = 0
    out = np.zeros_like(w)

    def scale_of(rows: np.ndarray) -> np.ndarray:
        found = weights.quantize(jnp.asarray(rows, jnp.float32), (-2,), kind, 0, search=True)
        return np.asarray(found.scale, np.float64)[0]

    scale = scale_of(w)
    for i in range(len(w)):
        if group and i % group == 0:
            scale = scale_of(w[i : i + group])
        out[i] = np.clip(np.round(w[i] / scale), -levels, levels) * scale
        w[i + 1 :] -= np.outer(u[i, i + 1 :], (w[i] - out[i]) / u[i, i])
    return out


@pytest.mark.parametrize(
    ("inputs", "kind", "group"),
    [
        (131, "int8", 0), (96, "int4", 32), pytest.param(96, "int4", 0, marks=pytest.mark.slow),
        pytest.param(300, "int4", 150, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_gptq_is_the_published_algorithm(inputs, kind, group):
    w, gram = layer(inputs)
    fast = jax.jit(solve.gptq, static_argnums=(2, 3))
    solved = fast(w, gram.astype(np.float32), kind, group).astype(jnp.float32)
    expected = gptq(w, gram, kind, group)
    assert error(w, solved, gram) == pytest.approx(error(w, expected, gram), rel=2e-2)
    assert np.isclose(np.asarray(solved), expected, rtol=1e-3, atol=1e-3).mean() > 0.98
    nearest = weights.quantize(jnp.asarray(w), (-2,), kind, group, search=True).astype(jnp.float32)
    assert error(w, solved, gram) < 0.8 * error(w, nearest, gram)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_wanda_compares_within_an_output(share):
    """Sun et al. 2023, eq. 1."""
    w, gram = layer(96)
    got = prune._wanda(jnp.asarray(w), jnp.asarray(gram, jnp.float32), Prune(sparsity=share))
    score = np.abs(w) * np.sqrt(np.diag(gram))[:, None]
    rank = np.argsort(np.argsort(score, 0, kind="stable"), 0, kind="stable")
    np.testing.assert_array_equal(got, np.where(rank < round(share * 96), 0, w))


@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_rounding_is_to_the_nearest_code_and_the_largest_is_kept(kind, group):
    """Codes of numpy and ml_dtypes; the largest weight of a group is the largest code, and nothing is NaN."""
    rng = np.random.default_rng(3)
    w = (rng.normal(size=(64, 12)) * 10.0 ** rng.integers(-6, 4, (1, 12))).astype(np.float32)
    got = np.asarray(weights.quantize(jnp.asarray(w), (-2,), kind, group).astype(jnp.float32))
    grouped = w.astype(np.float64).reshape(-1, group or 64, 12)
    top = np.abs(grouped).max(1, keepdims=True)
    scale = top / {"int8": 127, "int4": 7, "fp8": 448}[kind]
    if kind == "fp8":
        codes = (grouped / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    else:
        codes = np.round(grouped / scale)
    expected = (codes * scale).reshape(w.shape)
    assert np.isfinite(got).all()
    unlike = ~np.isclose(got, expected, rtol=1e-5)
    assert unlike.mean() < 5e-3  # a tie that float32 breaks the other way
    step = np.broadcast_to(scale * (32 if kind == "fp8" else 1), grouped.shape).reshape(w.shape)
    assert (np.abs(got - expected)[unlike] <= 1.01 * step[unlike]).all()
    largest = np.abs(got.reshape(grouped.shape)).max(1)
    np.testing.assert_allclose(largest, top[:, 0], rtol=1e-5)
