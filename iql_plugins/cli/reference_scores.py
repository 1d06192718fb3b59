"""The returns of a random and of an expert policy in the environments of D4RL, which scores are normalised by.

The numbers are those of D4RL (Fu et al. 2020, arXiv:2004.07219; ``d4rl/infos.py``), for its own versions of the
environments. Scores in later versions of the same environment (``Hopper-v5``) use them, too, as Minari does.
"""

import re

__all__ = ["normalized_score", "reference"]

#: Pattern of environment ids (whole, without a module), return of the random policy, of the expert.
_SCORES = (
    (r"halfcheetah(-\w+)*-v\d+", -280.178953, 12135.0),
    (r"hopper(-\w+)*-v\d+", -20.272305, 3234.3),
    (r"walker2d(-\w+)*-v\d+", 1.629008, 4592.3),
    (r"ant(-(random|medium|expert)(-\w+)*)?-v\d+", -325.6, 3879.7),
    (r"(adroithand)?pen(-(human|cloned|expert))?-v\d+", 96.262799, 3076.8331017826877),
    (r"(adroithand)?door(-(human|cloned|expert))?-v\d+", -56.512833, 2880.5693087298737),
    (r"(adroithand)?hammer(-(human|cloned|expert))?-v\d+", -274.856578, 12794.134825156867),
    (r"(adroithand)?relocate(-(human|cloned|expert))?-v\d+", -6.425911, 4233.877797728884),
    # D4RL's own environments, of which there are no later versions with the same rewards.
    (r"antmaze-(umaze|medium|large)(-\w+)*-v\d+", 0.0, 1.0),
    (r"kitchen-(complete|partial|mixed)-v\d+", 0.0, 4.0),
    (r"maze2d-umaze(-sparse)?-v\d+", 23.85, 161.86),
    (r"maze2d-medium(-sparse)?-v\d+", 13.13, 277.39),
    (r"maze2d-large(-sparse)?-v\d+", 6.7, 273.99),
)


def reference(env: str | None) -> tuple[float, float] | None:
    """Return of the random policy and of the expert in an environment; None where they are not known.

    >>> reference("Hopper-v5")
    (-20.272305, 3234.3)

    Args:
        env: its id.
    """
    name = (env or "").rpartition(":")[2].lower()
    return next(((low, high) for pattern, low, high in _SCORES if re.fullmatch(pattern, name)), None)


def normalized_score(env: str | None, mean_return: float) -> float | None:
    """D4RL's score: 0 for the random policy, 100 for the expert; None where they are not known.

    >>> normalized_score("hopper-medium-v2", 3234.3)
    100.0

    Args:
        env: the environment's id.
        mean_return: undiscounted.
    """
    scores = reference(env)
    return None if scores is None else 100.0 * (mean_return - scores[0]) / (scores[1] - scores[0])
