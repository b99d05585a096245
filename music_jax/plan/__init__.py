"""What a training step costs on chips that are not at hand: `python -m music_jax.plan`."""
