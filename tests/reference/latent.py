"""Latent pretraining's formulas in float64, slot by slot and example by example, from torch's hidden states."""

import numpy as np
import torch
from scipy.special import erf, logsumexp
from transformers.vision_utils import get_vision_window_index


def head(weights: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """M_phi: RMSNorm, Linear, GELU, Linear."""
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weights["norm"]
    x = x @ weights["fc1"] + weights["fc1_bias"]
    return x * (1 + erf(x / np.sqrt(2))) / 2 @ weights["fc2"] + weights["fc2_bias"]


def image_latents(model, inputs, space: str, side: int) -> np.ndarray:
    """(side * side, Z): one image's merged tokens, or its patches before the merger, pooled as torch pools."""
    grid = inputs["image_grid_thw"]
    _, rows, columns = grid[0].tolist()
    vision = model.config.vision_config
    merge = vision.spatial_merge_size
    with torch.no_grad():
        out = model.model.visual(inputs["pixel_values"], grid_thw=grid)
    if space == "merged":
        cells = out.pooler_output.reshape(rows // merge, columns // merge, -1)
    else:
        index, _ = get_vision_window_index(grid, merge, vision.window_size, vision.patch_size)
        units = out.last_hidden_state.reshape(len(index), merge, merge, -1)[torch.argsort(index)]
        cells = units.reshape(rows // merge, columns // merge, merge, merge, -1).transpose(1, 2)
        cells = cells.reshape(rows, columns, -1)
    pooled = torch.nn.functional.adaptive_avg_pool2d(cells.double().permute(2, 0, 1)[None], side)[0]
    return pooled.flatten(1).T.numpy()


def similarity(kind: str, p: np.ndarray, z: np.ndarray, options) -> float:
    """Sum over examples and slots; p and z (examples, S, Z)."""
    total, D = 0.0, p.shape[-1]
    every = z.reshape(-1, D)
    for e in range(len(p)):
        for s in range(p.shape[1]):
            a, b = p[e, s], z[e, s]
            if kind == "l2":
                total += ((a - b) ** 2).mean()
            elif kind == "smooth_l1":
                d, beta = np.abs(a - b), options.smooth_l1_beta
                total += np.where(d < beta, d**2 / (2 * beta), d - beta / 2).mean()
            else:
                if kind == "cosine":
                    loss = 1 - cosine(a, b)
                else:
                    logits = np.array([cosine(a, other) for other in every]) / options.temperature
                    loss = logsumexp(logits) - logits[e * p.shape[1] + s]
                loss *= (b**2).mean() if options.norm_weighted else 1
                total += loss + options.norm_term * (np.linalg.norm(a) - np.linalg.norm(b)) ** 2 / D
    return total


def alignment(kind: str, p: np.ndarray, z: np.ndarray, scale: float, bias: float) -> float:
    """Sum over examples; p and z (examples, Z), pooled."""
    n = len(p)
    pairs = np.array([[cosine(a, b) for b in z] for a in p])
    if kind == "infonce":
        logits = np.exp(scale) * pairs
        return sum((logsumexp(logits[i]) + logsumexp(logits[:, i])) / 2 - logits[i, i] for i in range(n))
    if kind == "sigmoid":
        signs = 2 * np.eye(n) - 1
        return np.log1p(np.exp(-signs * (np.exp(scale) * pairs + bias))).sum()
    difference = [(cosine(p[i], p[j]) - cosine(z[i], z[j])) ** 2 for i in range(n) for j in range(n) if i != j]
    return sum(difference) / (n - 1)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> float:
    """Sum of -log softmax(logits)[target], float64."""
    logits = logits.astype(np.float64)
    return sum(logsumexp(row) - row[target] for row, target in zip(logits, targets, strict=True))
