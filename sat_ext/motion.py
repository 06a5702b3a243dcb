"""How much a clip moves."""

import numpy as np


def flow_score(clip: np.ndarray, fps: float) -> float:
    """The mean length of the optical flow of `clip`, uint8 RGB (T, H, W, 3), in frame heights a second.

    EvalCrafter's Flow-Score (arXiv 2310.11440), the mean over all pixels and pairs of neighbouring frames; but
    with DIS (arXiv 1603.03590), which needs no weights, in place of RAFT. 0 of a still."""
    import cv2  # an extra; `model.sampling.motion` is checked for it

    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in clip]
    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    lengths = [np.linalg.norm(flow.calc(a, b, None), axis=-1).mean() for a, b in zip(grey, grey[1:])]  # type: ignore
    return float(np.mean(lengths)) * fps / clip.shape[1] if lengths else 0.0
