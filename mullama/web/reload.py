"""What a running server takes over of a changed configuration, on SIGHUP."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields

from mullama.config import ServeConfig
from mullama.errors import ConfigError
from mullama.web.services import Services

log = logging.getLogger(__name__)

#: What counts at once; the rest takes a restart.
RELOADED = ("api_key", "admin_key", "key_file")


class Reload:
    """Called on the event loop: reads the configuration again, takes over its keys, opens the profile log anew.

    ``read`` gives the configuration as a start would have it now: flags and environment are what they were, so what can
    have changed is its file. One that is wrong changes nothing and is logged: the keys that held go on to hold.
    """

    def __init__(self, services: Services, read: Callable[[], ServeConfig]) -> None:
        self._services = services
        self._read = read

    def __call__(self) -> None:
        if self._services.profile_log is not None:
            self._services.profile_log.reopen()
        try:
            self._take(self._read())
        except ConfigError as error:
            log.error("the configuration is not taken over, the keys stay as they are: %s", error.message)

    def _take(self, new: ServeConfig) -> None:
        old = self._services.config
        if self._services.security is not None:
            self._services.security.take_keys(new)
        changed = [field.name for field in fields(ServeConfig) if getattr(old, field.name) != getattr(new, field.name)]
        for name in RELOADED:
            setattr(old, name, getattr(new, name))
        later = [name for name in changed if name not in RELOADED]
        log.info("reloaded: %s", ", ".join(name for name in RELOADED if name in changed) or "nothing has changed")
        if later:
            log.warning("a restart is needed for what else has changed: %s", ", ".join(later))
