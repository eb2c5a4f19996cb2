"""AWS Batch's stand-in: localbatch answers the API, and the container of each job is a process in place of Docker's."""

import threading
import time
from pathlib import Path

import uvicorn
from localbatch.runner import DockerRunner
from localbatch.server import create_app
from localbatch.store import Store

from stand_ins.pod import Pod


class Container(Pod):
    """A pod with the methods of a Docker container that localbatch calls."""

    @property
    def id(self) -> str:
        return self.home.name

    def wait(self, timeout: float | None = None) -> dict:
        return {"StatusCode": super().wait()}

    def logs(self, **_: object) -> bytes:
        return self.log().encode()

    def remove(self, force: bool = False) -> None:
        pass


class Docker:
    """As much of the Docker client as localbatch calls: `client.containers.run` and `.get`."""

    def __init__(self, folder: Path):
        self.folder, self.made, self.containers = folder, [], self

    def run(self, image: str, command: list[str], environment: dict[str, str], **_: object) -> Container:
        self.made.append(Container(command, environment, self.folder))
        return self.made[-1]

    def get(self, container_id: str) -> Container:
        return next(container for container in self.made if container.id == container_id)


class Runner(DockerRunner):
    """localbatch's runner, over `Docker`."""

    def __init__(self, store: Store, port: int, folder: Path):
        self.folder = folder
        super().__init__(store, host_addr="127.0.0.1", port=port)

    def _connect(self) -> None:
        self._client = Docker(self.folder)


class Batch:
    """The service at `url`, with queues that EC2 machines serve."""

    def __init__(self, folder: Path, port: int, *queues: str):
        self.url, self.store = f"http://127.0.0.1:{port}", Store(queue_name=queues[0])
        for queue in queues[1:]:
            self.store.create_queue(queue, self.store.get_queues()[0])
        self.runner = Runner(self.store, port, folder)
        config = uvicorn.Config(create_app(self.store, self.runner), host="127.0.0.1", port=port, log_level="error", loop="asyncio")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.02)

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        for container in self.runner._client.made:
            container.kill_group()

    def of_step(self, step: str) -> list[dict]:
        """The jobs of a step, one for each attempt."""
        return [job for job in self.store.get_jobs() if job["parameters"]["metaflow.step_name"] == step]

    def pods_of(self, step: str) -> list[Container]:
        started = [job["_container_id"] for job in self.of_step(step) if "_container_id" in job]
        return [self.runner._client.get(name) for name in started]
