"""Buttons that lead to the public repository: there once its address is set in _config.yml, absent until then."""

from __future__ import annotations

from typing import Any


def _buttons(app: Any, config: Any) -> None:
    options = config.html_theme_options
    if options.get("repository_url"):
        options["use_repository_button"] = options["use_issues_button"] = True
    else:
        options["launch_buttons"] = {}  # the theme cannot build a link from an empty address


def setup(app: Any) -> dict[str, Any]:
    app.connect("config-inited", _buttons)
    return {"version": "1", "parallel_read_safe": True}
