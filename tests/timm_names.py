"""A pytest plugin: timm's own tests of models, over the models of this package.

    PYTHONPATH=.:tests python -m pytest -p timm_names TIMM/tests/test_models.py

timm's lists give our models instead of timm's, also where timm leaves out `*mixer_*`. Some tests
name a few models of many to which they apply; these get ours too. All others are deselected.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
import timm

from convmixer_hub.zoo import default_cfgs

_FOR_EVERY_MODEL = {
    "test_feature_getter_stage_ends_torchscript",
    "test_forward_after_prune_intermediate_layers",
    "test_head_hidden_size",
    "test_prune_intermediate_layers_params_used",
    "test_prune_to_stem_feature",
    "test_reset_classifier_keeps_pool",
}

_list_models = timm.list_models


def _list_ours(
    filter: Collection[str] = "",
    module: Collection[str] = "",
    exclude_filters: Collection[str] = (),
    **options: Any,
) -> list[str]:
    exclude = [pattern for pattern in exclude_filters if pattern != "*mixer_*"]
    return _list_models(filter, module="zoo", exclude_filters=exclude, **options)


timm.list_models = _list_ours  # before the tests import it


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function.__name__ not in _FOR_EVERY_MODEL:
        return
    ours = {
        "model_name": list(default_cfgs),
        "model_name, model_kwargs": [(arch, {}) for arch in default_cfgs],
    }
    markers = metafunc.definition.own_markers
    for i, mark in enumerate(markers):
        if mark.name == "parametrize" and mark.args[0] in ours:
            markers[i] = pytest.mark.parametrize(mark.args[0], ours[mark.args[0]]).mark


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def is_ours(item: pytest.Item) -> bool:
        name = getattr(item, "callspec", None) and item.callspec.params.get("model_name")
        return isinstance(name, str) and name.partition(".")[0] in default_cfgs

    config.hook.pytest_deselected(items=[item for item in items if not is_ours(item)])
    items[:] = [item for item in items if is_ours(item)]
