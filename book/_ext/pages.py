"""What a page offers: links to the public repository once its address is set in _config.yml, and no script without a use."""

from __future__ import annotations

from typing import Any


def _buttons(app: Any, config: Any) -> None:
    options = config.html_theme_options
    if options.get("repository_url"):
        options["use_repository_button"] = options["use_issues_button"] = True
    else:
        options["launch_buttons"] = {}  # the theme cannot build a link from an empty address


def _no_thebe(app: Any, config: Any) -> None:
    # Jupyter Book always loads it. It is off here, yet would put its script on every page, and twice, which is an error there.
    for listeners in app.events.listeners.values():
        for listener in list(listeners):
            if listener.handler.__module__ == "sphinx_thebe":
                app.disconnect(listener.id)


def setup(app: Any) -> dict[str, Any]:
    app.connect("config-inited", _buttons)
    app.connect("config-inited", _no_thebe)
    return {"version": "1", "parallel_read_safe": True}
