"""The allow-list: keys and values that a configuration may have, for the scheduler that takes it over."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers

from unetc.errors import ModelError

from .classes import CLASSES, INSIDE, LEGACY, LIMITS, PREDICTIONS, REFUSED, SCHEDULE, TRAINING, Family
from .names import SCHEDULERS

_NEAREST = {Family.BETAS: "ddim", Family.EDM: "edm-euler or edm-dpmsolver++", Family.FLOW: "flow-euler"}
_ALL_KEYS = frozenset[str]().union(*(row.keys for row in CLASSES.values()))


def check_source(name: str, config: Mapping[str, Any]) -> None:
    """Check that a scheduler can take over the configuration of a pipeline's own scheduler.

    Raises:
        ModelError: If the class or a key is not known, or does not fit the scheduler.
    """
    class_name, _ = SCHEDULERS[name]
    source = config.get("_class_name")
    if source is not None and source not in CLASSES:
        if refused := REFUSED.get(str(source)):
            raise ModelError(
                f"the pipeline's scheduler is {source}, which {refused.reason}. Nearest: {refused.nearest}."
            )
        raise ModelError(
            f"the pipeline's scheduler is {source}, which unetc does not know. Known are {', '.join(CLASSES)}."
        )
    family = CLASSES[source].family if source is not None else _family_of(config)
    own = CLASSES[class_name].family if class_name in CLASSES else Family.BETAS
    if family != own:
        raise ModelError(
            f"{class_name} cannot sample a model that was trained for {family.value}. Choose {_NEAREST[family]}."
        )
    _check_keys(class_name, source, config, family)


def _family_of(config: Mapping[str, Any]) -> Family:
    """Guess the family of a configuration without a class from the keys that only one family has."""
    if "sigma_data" in config:
        return Family.EDM
    return Family.FLOW if "shift" in config else Family.BETAS


def _check_keys(class_name: str, source: str | None, config: Mapping[str, Any], family: Family) -> None:
    """Refuse keys that are not known, and keys about the training that the scheduler would ignore."""
    known = frozenset().union(*(row.keys for row in CLASSES.values() if row.family == family))
    own = keys_of(class_name)
    for key, value in config.items():
        if key in own or key in INSIDE or key in LEGACY:
            continue
        if key in TRAINING:
            if value not in TRAINING[key]:
                raise ModelError(
                    f"{class_name} does not know {key}, which is {value!r} in the pipeline's {source or 'scheduler'}: "
                    f"the model was trained with it. Choose a scheduler that knows it: {_knowing(key, family)}."
                )
        elif key not in known and not (key in _ALL_KEYS and value in (None, False)):
            raise ModelError(
                f"the configuration of the pipeline's {source or 'scheduler'} has the key {key!r}, which unetc does "
                f"not know for {family.value}. Remove it if it does not matter, or use diffusers."
            )
    if source in (None, class_name):
        return
    theirs, ours = _defaults(source), _defaults(class_name)
    for key in SCHEDULE:
        if key in theirs and key in ours and key not in config and theirs[key] != ours[key]:
            raise ModelError(
                f"the configuration of the pipeline's {source} has no {key}, whose default is {theirs[key]!r} there "
                f"and {ours[key]!r} in {class_name}. Add {key} to the configuration."
            )


def _knowing(key: str, family: Family) -> str:
    names = [
        name
        for name, (class_name, _) in SCHEDULERS.items()
        if class_name in CLASSES and CLASSES[class_name].family == family and key in CLASSES[class_name].keys
    ]
    return ", ".join(names) or "none of unetc's does"


def keys_of(class_name: str) -> frozenset[str]:
    """List the keys of a class; one that was added to `SCHEDULERS` alone brings its own."""
    if class_name in CLASSES:
        return CLASSES[class_name].keys
    return frozenset(_defaults(class_name))


def _defaults(class_name: str) -> dict[str, Any]:
    """Read the default of every key from the signature of the class."""
    parameters = inspect.signature(getattr(diffusers, class_name).__init__).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not one.empty}


def check_values(class_name: str, config: Mapping[str, Any]) -> None:
    """Refuse values that a table cannot express, with a reason that helps.

    `from_config` keeps keys that only other classes know, so a key counts only together with the class.

    Raises:
        ModelError: If there is such a value.
    """
    keys = keys_of(class_name)
    for key, limits in LIMITS.items():
        for limit in limits:
            if key not in keys or key not in config or (limit.classes and class_name not in limit.classes):
                continue
            if config[key] not in limit.values:
                raise ModelError(f"{class_name} has {key} {config[key]!r}, which {limit.reason}. {limit.advice}")
    if "trained_betas" in keys and (betas := config.get("trained_betas")) is not None:
        _check_betas(class_name, len(betas), {**_defaults(class_name), **config}["num_train_timesteps"])
    kind = config.get("prediction_type", "epsilon")
    if "prediction_type" in keys and kind not in PREDICTIONS:
        raise ModelError(
            f"{class_name} has prediction_type {kind!r}. Supported are {', '.join(PREDICTIONS)}, without flow."
        )


def _check_betas(class_name: str, count: int, trained: int) -> None:
    if count < trained:
        raise ModelError(
            f"{class_name} has {count} trained_betas and num_train_timesteps {trained}. Expected a beta for every "
            "timestep: correct one of the two in the scheduler's configuration."
        )
