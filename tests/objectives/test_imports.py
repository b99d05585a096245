import subprocess
import sys

HEAVY = ("tensorflow", "tensorflow_datasets", "grain", "cv2", "clu", "flax", "orbax")


def test_the_objectives_pull_in_nothing_heavy():
    program = f"import sys, music_jax.objectives; print([m for m in {HEAVY} if m in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert out.stdout.strip() == "[]"
