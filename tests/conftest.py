"""Fixtures shared by all tests."""

import importlib.util
import json
import os
from contextlib import ExitStack
from pathlib import Path

import pytest
import tiny_model
from oracle import extra

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--emulated-gpu", action="store_true", help="run the tests marked gpu on the emulated one")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--emulated-gpu"):
        from emulated_cuda import emulated_gpu

        stack = ExitStack()
        stack.enter_context(emulated_gpu())
        config.add_cleanup(stack.close)
        return
    if importlib.util.find_spec("pyllm._cuda") is None:
        return
    from pyllm import LLM
    from pyllm.device import unavailable

    if unavailable() is None:  # what tests promise of the CPU they promise on a machine with a GPU too
        (LLM.__init__.__kwdefaults__ or {})["device"] = os.environ["PYLLM_DEVICE"] = "cpu"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip those marked ``oracle`` where there is nothing to compare with, but for ``oracle(partly=True)``."""
    marker = item.get_closest_marker("oracle")
    if marker is not None and not marker.kwargs.get("partly") and (reason := extra.missing(*marker.args)):
        pytest.skip(reason)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real models and texts that lies beside a development checkout; a plain clone has none.

    With PYLLM_REQUIRE_DATA=1 its absence is a failure.
    """
    if not SHARED.is_dir():
        missing = "no ../shared/data beside this checkout"
        if os.environ.get("PYLLM_REQUIRE_DATA") == "1":
            pytest.fail(f"{missing}, but PYLLM_REQUIRE_DATA=1: put it there, or unset the variable")
        pytest.skip(missing)
    return SHARED


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random LLaMA with a tokenizer and without a chat template."""
    return tiny_model.make(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_bos_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, whose tokenizer puts a start token before every text."""
    folder = tiny_model.make(tmp_path_factory.mktemp("tiny") / "bos")
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    begin, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, text],
        "pair": [begin, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    path.write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="session")
def tiny_chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a chat template."""
    return tiny_model.make(tmp_path_factory.mktemp("tiny") / "chat", chat=True)
