"""The tests' environment: offline, silent, repeatable. It is set before anything heavy is imported, and children inherit it."""

import os
import socket
import sys
from pathlib import Path

import pytest

CACHE = Path(__file__).resolve().parents[1] / ".pytest_cache"

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HOME=str(CACHE / "huggingface"),
    HF_HUB_DISABLE_TELEMETRY="1",
    MLFLOW_DISABLE_TELEMETRY="true",
    DO_NOT_TRACK="1",
    GOMP_SPINCOUNT="0",
    TOKENIZERS_PARALLELISM="false",
    # A child process that would reach for the network meets a closed port at once.
    HTTP_PROXY="http://127.0.0.1:9",
    HTTPS_PROXY="http://127.0.0.1:9",
    NO_PROXY="localhost,127.0.0.1,::1",
)
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("A2D_CACHE", str(CACHE / "a2d"))  # the embedded base, by content: trained once
os.environ.setdefault("METAFLOW_USER", "tester")
for name in ("MLFLOW_TRACKING_URI", "HF_TOKEN", "http_proxy", "https_proxy", "no_proxy"):
    os.environ.pop(name, None)


def is_loopback(address: object) -> bool:
    """Whether a socket address stays on this machine: a path (AF_UNIX), or a loopback host."""
    host = address[0] if isinstance(address, tuple) else None
    return host is None or host in ("localhost", "::1", "") or str(host).startswith(("127.", "::ffff:127."))


@pytest.fixture(autouse=True, scope="module")
def no_tracking_left_behind():
    """MLflow keeps its URI in the process and in the environment: the next module begins without it."""
    yield
    if "mlflow" in sys.modules:
        sys.modules["mlflow"].set_tracking_uri(None)
        os.environ.pop("MLFLOW_TRACKING_URI", None)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Refuse every connection that leaves this machine, and fail the test even where the refusal was swallowed."""
    refused = []

    def guard(method):
        def connect(self, address, *rest):
            if self.family in (socket.AF_INET, socket.AF_INET6) and not is_loopback(address):
                refused.append(address)
                raise OSError(f"tests are offline: a connection to {address} was refused")
            return method(self, address, *rest)

        return connect

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, guard(getattr(socket.socket, name)))
    yield
    assert not refused, f"the test tried to reach {refused}"


@pytest.fixture
def no_forward(monkeypatch):
    """A test that reaches a forward pass fails."""
    from a2d_core.models import DiffusionModel  # heavy, and needed by few

    def hidden(self, *_, **__):
        raise AssertionError("a forward pass began")

    monkeypatch.setattr(DiffusionModel, "hidden", hidden)


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """The directory of a tiny autoregressive model with random weights; modules that need a larger one have their own."""
    import families  # heavy, and needed by few

    return families.save_source(tmp_path_factory.mktemp("source"), layers=1, max_position_embeddings=128)


@pytest.fixture(scope="session")
def checkpoints(source, tmp_path_factory):
    """Objective -> the directory of its conversion."""
    import families

    return families.convert_both(source, tmp_path_factory.mktemp("converted"))
