"""Draws the joint probability of two views' units: `joint_probability.svg` of the method's page.

    python docs/figures/joint_probability.py docs/figures/joint_probability.svg

Four batches of embeddings with 3 segments of 8 units, from the collapsed one to the minimum.
"""

import sys

import matplotlib
import numpy as np

matplotlib.use("agg")

import jax.numpy as jnp
import matplotlib.pyplot as plt

from music_jax.objectives import joint_probability, music_loss, music_lower_bound

SEGMENTS, UNITS = 3, 8
SAMPLES = UNITS**SEGMENTS


def batches() -> dict[str, np.ndarray]:
    """Returns the embeddings [samples, segments * units] of each case, equal in both views."""
    codes = np.stack(np.unravel_index(np.arange(SAMPLES), (UNITS,) * SEGMENTS), axis=1)
    alike = np.repeat(codes[:, :1], SEGMENTS, axis=1)

    def embed(codes: np.ndarray) -> np.ndarray:
        one_hot = codes[..., None] == np.arange(UNITS)
        return (20.0 * one_hot).reshape(SAMPLES, -1).astype(np.float32)

    return {
        "collapsed:\nall samples alike": embed(np.zeros_like(codes)),
        "uncertain:\nall units equally probable": np.zeros((SAMPLES, SEGMENTS * UNITS), np.float32),
        "redundant:\nall segments partition alike": embed(alike),
        "the minimum:\ncertain, uniform, independent": embed(codes),
    }


def main(output: str) -> None:
    """Draws the figure."""
    found = batches()
    figure, axes = plt.subplots(2, 2, figsize=(8.6, 8.2), constrained_layout=True)
    for axis, (name, embeddings) in zip(axes.flat, found.items(), strict=True):
        z = jnp.asarray(embeddings)
        p = np.asarray(joint_probability(z, z, num_segments=SEGMENTS))
        loss = round(float(music_loss(z, z, num_segments=SEGMENTS)), 2) + 0.0  # no -0.00
        # By its root, so that both 1/K on the diagonal and 1/K² elsewhere can be seen.
        shown = axis.imshow(np.sqrt(p), cmap="viridis", vmin=0, vmax=1 / np.sqrt(UNITS))
        for edge in range(0, SEGMENTS * UNITS + 1, UNITS):
            axis.axhline(edge - 0.5, color="white", linewidth=1.2)
            axis.axvline(edge - 0.5, color="white", linewidth=1.2)
        middles = [UNITS * (s + 0.5) - 0.5 for s in range(SEGMENTS)]
        names = [f"segment {s + 1}" for s in range(SEGMENTS)]
        axis.set_xticks(middles, names, fontsize=8)
        axis.set_yticks(middles, names, fontsize=8, rotation=90, va="center")
        axis.tick_params(length=0)
        axis.set_title(f"{name}\nloss {loss:.2f}", fontsize=10)
        axis.set_xlabel("units of the second view", fontsize=9)
        axis.set_ylabel("units of the first view", fontsize=9)
    levels = {0.0: "0", 1 / UNITS: "1/K²", 1 / np.sqrt(UNITS): "1/K and more"}
    bar = figure.colorbar(shown, ax=axes, shrink=0.5, ticks=list(levels))
    bar.ax.set_yticklabels(list(levels.values()))
    bar.set_label("joint probability $P_{ij}$")
    figure.suptitle(f"The least loss is −3 log K = {music_lower_bound(UNITS):.2f}", fontsize=10)
    figure.savefig(output, metadata={"Date": None})


if __name__ == "__main__":
    matplotlib.rcParams["svg.hashsalt"] = "music_jax"
    main(*sys.argv[1:])
