"""The public names."""

import importlib
import pkgutil

import pytest

import moeret


def test_all_is_sorted_and_every_name_is_there():
    assert moeret.__all__ == sorted(moeret.__all__) == dir(moeret)
    for name in moeret.__all__:
        assert getattr(moeret, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Retreiver'"):
        _ = moeret.Retreiver


def test_public_functions_and_classes_have_docstrings():
    for module in pkgutil.walk_packages(moeret.__path__, "moeret."):
        assert importlib.import_module(module.name).__doc__, module.name
    assert all(getattr(moeret, name).__doc__ for name in moeret.__all__)
