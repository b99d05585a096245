"""Draws the response of each term of the objective: `terms.svg` of the method's page.

    python docs/figures/terms.py docs/figures/terms.svg

Each panel starts at the minimum and gradually removes one property of the embeddings. The samples
are chosen so that the minimum is reached exactly; only the changes are drawn at random, from a
fixed seed.
"""

import math
import sys

import matplotlib
import numpy as np

matplotlib.use("agg")

import jax.numpy as jnp
import matplotlib.pyplot as plt

from music_jax.objectives import music_lower_bound, music_terms

SEGMENTS, UNITS = 3, 8
SAMPLES = UNITS**SEGMENTS  # every code once: uniform and independent
_SHARP = 20.0  # logit of the chosen unit; the others have exp(-20) of its probability
_COLORS = {"diagonal": "#0072b2", "cross_segment": "#d55e00", "invariance": "#009e73"}


def all_codes() -> np.ndarray:
    """Returns every combination of units once, [samples, segments]."""
    return np.stack(np.unravel_index(np.arange(SAMPLES), (UNITS,) * SEGMENTS), axis=1)


def embed(codes: np.ndarray, logit: float = _SHARP) -> np.ndarray:
    """Returns embeddings [samples, segments * units] whose segments choose the given units."""
    one_hot = codes[..., None] == np.arange(UNITS)
    return (logit * one_hot).reshape(len(codes), -1).astype(np.float32)


def degrade(share: float, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns embeddings of both views without one property for a share of the samples."""
    rng = np.random.default_rng(0)
    codes = all_codes()
    hit = rng.permutation(SAMPLES) < share * SAMPLES
    if what == "certainty":  # the chosen unit's probability falls from 1 to 1/K
        largest = 1 - share * (1 - 1 / UNITS)
        logit = math.log(largest * (UNITS - 1) / max(1 - largest, 1e-8))
        both = embed(codes, min(logit, _SHARP))
        return both, both
    if what == "usage":  # every segment gives these samples to its first unit
        codes[hit] = 0
    if what == "independence":  # the second segment repeats the first
        codes[hit] = codes[hit, :1]
    second = codes.copy()
    if what == "agreement":  # the second view falls into units at random
        second[hit] = rng.integers(0, UNITS, (hit.sum(), SEGMENTS))
    return embed(codes), embed(second)


def main(output: str) -> None:
    """Draws the figure."""
    panels = {
        "certainty": "no segment is certain\n(all units equally probable)",
        "usage": "collapse\n(all samples in one unit)",
        "independence": "redundant segments\n(all partition alike)",
        "agreement": "views disagree\n(independent of each other)",
    }
    figure, axes = plt.subplots(2, 2, figsize=(8.6, 6.6), sharey=True)
    shares = np.linspace(0, 1, 21)
    log_units = math.log(UNITS)
    least = {"diagonal": -log_units, "cross_segment": -2 * log_units, "invariance": 0.0}
    for axis, (what, end) in zip(axes.flat, panels.items(), strict=True):
        terms = [
            music_terms(*map(jnp.asarray, degrade(share, what)), num_segments=SEGMENTS)
            for share in shares
        ]
        values = {name: np.asarray([float(getattr(t, name)) for t in terms]) for name in least}
        for name, at_least in least.items():
            axis.plot(
                shares,
                np.minimum(values[name] - at_least, 12),
                color=_COLORS[name],
                label=f"{name.replace('_', '-')} term",
            )
        total = sum(values.values()) - music_lower_bound(UNITS)
        axis.plot(shares, np.minimum(total, 12), color="black", linestyle="--", label="loss")
        axis.set_xlabel(f"0: the minimum      1: {end}", fontsize=9)
        axis.set_title(f"without {what}", fontsize=11)
        axis.set_ylim(-0.4, 8)
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("above its least value [nats]")
    axes[0, 0].legend(loc="upper left", fontsize=9)
    figure.tight_layout()
    figure.savefig(output, metadata={"Date": None})


if __name__ == "__main__":
    matplotlib.rcParams["svg.hashsalt"] = "music_jax"
    main(*sys.argv[1:])
