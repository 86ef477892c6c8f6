"""How long will an answer be? Predictors for policies that order by remaining work."""

from __future__ import annotations

from typing import Any, Protocol, cast

from mullama.errors import InvalidRequest, PluginError
from mullama.logs import said
from mullama.plugins.groups import is_fault
from mullama.plugins.user_code import is_path, load_object
from mullama.scheduling.base import SeqView


class Predictor(Protocol):
    """Predicts the number of tokens that a request will generate."""

    def predict(self, seq: SeqView) -> float:
        """Asked once, when the request comes; must not keep ``seq``."""

    def observe(self, seq: SeqView) -> None:
        """A request ended after ``seq.generated`` tokens. May be left out."""


class MaxTokens:
    """What the request allows: never too short, mostly too long."""

    def predict(self, seq: SeqView) -> float:
        return seq.max_tokens

    def observe(self, seq: SeqView) -> None:
        """The limit does not learn."""


class MeanLength:
    """The mean length of the same user's finished answers; of everybody's, for a new user; at first the limit."""

    USERS_KEPT = 10_000

    def __init__(self) -> None:
        self._of_user: dict[str | None, tuple[int, int]] = {}  # answers, tokens; least recently observed first
        self._of_all = (0, 0)

    def predict(self, seq: SeqView) -> float:
        answers, tokens = self._of_user.get(seq.user, self._of_all)
        return min(tokens / answers, seq.max_tokens) if answers else seq.max_tokens

    def observe(self, seq: SeqView) -> None:
        if seq.generated == 0:
            return  # it never came to answer
        answers, tokens = self._of_user.pop(seq.user, (0, 0))
        self._of_user[seq.user] = (answers + 1, tokens + seq.generated)
        self._of_all = (self._of_all[0] + 1, self._of_all[1] + seq.generated)
        if len(self._of_user) > self.USERS_KEPT:
            del self._of_user[next(iter(self._of_user))]


PREDICTORS: dict[str, type[Predictor]] = {"max_tokens": MaxTokens, "mean": MeanLength}


def create_predictor(spec: str) -> Predictor:
    """``max_tokens``, ``mean``, ``FILE.py:CLASS`` or ``package.module:CLASS`` (called without arguments).

    Raises InvalidRequest where there is no such predictor, PluginError where a user's one cannot be used.
    """
    if not is_path(spec):
        if spec not in PREDICTORS:
            message = f"there is no predictor '{spec}'; there are {', '.join(PREDICTORS)}, and FILE.py:CLASS"
            raise InvalidRequest(message, param="params.predictor")
        return PREDICTORS[spec]()
    found: Any = load_object(spec, "predictor")
    if not callable(getattr(found, "predict", None)):
        raise PluginError(f"the predictor '{spec}' has no method predict")
    try:
        return cast(Predictor, found())
    except BaseException as error:  # foreign code
        if not is_fault(error):
            raise
        raise PluginError(f"cannot make the predictor '{spec}': {said(error)}") from error
