"""How likely each given label is wrong, from what a run has learnt; and how well that agrees with true labels.

`scores` never reads a true label; `measures` is told which are wrong, where somebody knows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from autodo_dist.data.split import Labels
from autodo_dist.learnt import Columns, Numbers


def scores(columns: Columns) -> Numbers:
    """A score for each of the N train samples, float32; the higher, the more suspect the given label y.

    1 - p(y)·q(y): p is the model's prediction for the picture as it is packed, q the learnt soft label. Each is the
    belief of somebody who was told y: the model was fitted to it, as far as the weights let it count, and q began
    there. Where a belief is low nevertheless, the others and the clean validation part speak against y. The product is
    the chance that two labels drawn from p and q are both y: no constant, and the order of p where q was hardly moved.

    A belief that is not known counts as certain; where neither is, the score is -w, as a small weight was learnt for
    what does not help, and 0 where nothing is known at all.
    """
    beliefs = [it for it in (columns.given_prediction_N, columns.given_probability_N) if it is not None]
    if not beliefs:
        return np.zeros(len(columns.id_N), np.float32) if columns.weight_N is None else -columns.weight_N
    score_N: Numbers = 1 - np.prod([np.nan_to_num(it, nan=1.0) for it in beliefs], 0, np.float32)
    return score_N


def suggestions(columns: Columns) -> tuple[Labels, Numbers] | None:
    """The label to suggest for each sample and its probability: by the model's prediction and the given label where
    the model was asked (predictions.suggest), else the learnt label; None where neither is known.
    """
    label_N, share_N = columns.learnt_N, columns.learnt_probability_N
    suggested_N, probability_N = columns.suggested_N, columns.suggested_probability_N
    if suggested_N is None or probability_N is None:
        return None if label_N is None or share_N is None else (label_N, share_N)
    if label_N is None or share_N is None:
        label_N, share_N = columns.given_N, np.ones_like(probability_N)
    asked_N = suggested_N >= 0  # pictures that were dropped are not
    return np.where(asked_N, suggested_N, label_N), np.where(asked_N, probability_N, share_N)


def measures(score_N: npt.NDArray[np.floating], wrong_N: npt.NDArray[np.bool_]) -> dict[str, float]:
    """How well a score finds the wrong labels: AUROC, average precision, precision at the noise rate.

    The last is the share of wrong ones among the n most suspect, n being how many are wrong; of equal scores the first
    ones are taken. AUROC is 0.5 by chance, the others the share of wrong labels. Some labels must be wrong, not all.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    first = np.argsort(-score_N, kind="stable")[: np.count_nonzero(wrong_N)]
    return {
        "auroc": float(roc_auc_score(wrong_N, score_N)),
        "average_precision": float(average_precision_score(wrong_N, score_N)),
        "precision_at_noise_rate": float(wrong_N[first].mean()),
    }
