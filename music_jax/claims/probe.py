"""The classifiers of a comparison: logistic regression to convergence, and HOG with an SVM."""

import warnings
from typing import NamedTuple

import numpy as np

PENALTIES = (1e-2, 1e-3, 1e-4, 1e-5)  # λ of the mean loss plus λ/2 times the squared weights
_TOLERANCE = 1e-4  # largest entry of the gradient of the sum of the losses, divided by the samples
_MAX_STEPS = 2000


class Probe(NamedTuple):
    """A logistic regression whose penalty was chosen on validation samples.

    Attributes:
      validation_top1: Accuracy for the validation samples.
      penalty: The chosen penalty.
      converged: Whether the optimizer reached its tolerance.
      predictions: Predicted labels of the test samples, if any were given.
    """

    validation_top1: float
    penalty: float
    converged: bool
    predictions: np.ndarray | None


def logistic_probe(
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    test: np.ndarray | None = None,
) -> Probe:
    """Fits multinomial logistic regressions, and chooses the penalty with the best validation.

    Features are standardized by the training samples. The largest penalty is fitted first, and each
    fit starts from the weights of the one before.

    Args:
      train: Features [samples, features] and integer labels [samples].
      validation: Likewise.
      test: Features of test samples.
    """
    # Imported here because scikit-learn takes seconds to import.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    features = np.asarray(train[0], np.float64)
    mean, std = features.mean(axis=0), features.std(axis=0)
    scale = np.divide(1.0, std, out=np.zeros_like(std), where=std > 1e-6 * std.max(initial=0.0))
    standardized = (features - mean) * scale
    classifier = LogisticRegression(tol=_TOLERANCE, max_iter=_MAX_STEPS, warm_start=True)
    best = Probe(-1.0, 0.0, False, None)
    for penalty in PENALTIES:
        classifier.set_params(C=1 / (penalty * len(features)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            classifier.fit(standardized, train[1])
        top1 = float(classifier.score((validation[0] - mean) * scale, validation[1]))
        if top1 > best.validation_top1:
            predictions = None if test is None else classifier.predict((test - mean) * scale)
            converged = bool(classifier.n_iter_.max() < _MAX_STEPS)
            best = Probe(top1, penalty, converged, predictions)
    return best


def hog_features(images: np.ndarray, *, cell: int = 4, directions: int = 9) -> np.ndarray:
    """Returns histograms of oriented gradients of the mean over channels, in blocks of 2 x 2 cells.

    Each block has unit length, with entries of at most 0.2 before it is scaled once more (L2-Hys).

    Args:
      images: uint8 [images, height, width, channels].
      cell: Side of a cell, in pixels.
      directions: Number of directions in half a turn.

    Returns:
      float32 [images, features].

    Reference:
      Dalal & Triggs, Histograms of Oriented Gradients for Human Detection, 2005
    """
    x = images.mean(axis=3, dtype=np.float32)  # [images, height, width]
    vertical, horizontal = np.zeros_like(x), np.zeros_like(x)
    vertical[:, 1:-1] = x[:, 2:] - x[:, :-2]
    horizontal[:, :, 1:-1] = x[:, :, 2:] - x[:, :, :-2]
    angle = np.rad2deg(np.arctan2(vertical, horizontal)) % 180
    which = np.minimum(angle * directions / 180, directions - 1).astype(np.int64)
    magnitude = np.hypot(vertical, horizontal)
    rows, columns = x.shape[1] // cell, x.shape[2] // cell
    cells = np.empty((len(x), rows, columns, directions), np.float32)
    for i in range(directions):
        part = np.where(which == i, magnitude, 0)[:, : rows * cell, : columns * cell]
        cells[..., i] = part.reshape(-1, rows, cell, columns, cell).mean(axis=(2, 4))
    corners = [cells[:, i : rows - 1 + i, j : columns - 1 + j] for i in (0, 1) for j in (0, 1)]
    blocks = np.concatenate(corners, axis=3)  # [images, rows - 1, columns - 1, 4 * directions]

    def unit(blocks: np.ndarray) -> np.ndarray:
        return blocks / np.sqrt(np.sum(blocks**2, axis=3, keepdims=True) + 1e-10)

    return unit(np.minimum(unit(blocks), 0.2)).reshape(len(x), -1)


def support_vector_machine(
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    test: np.ndarray,
) -> Probe:
    """Fits support vector machines with an RBF kernel; see `logistic_probe`.

    C is chosen by fits on a fifth of the training samples, since a fit takes time with the square
    of their number.
    """
    from sklearn.svm import SVC

    few = slice(None, None, 5)
    scores = {
        c: SVC(C=c).fit(train[0][few], train[1][few]).score(*validation) for c in (1.0, 10.0, 100.0)
    }
    chosen = max(scores, key=lambda c: scores[c])
    classifier = SVC(C=chosen).fit(*train)
    top1 = float(classifier.score(*validation))
    return Probe(top1, chosen, True, classifier.predict(test))
