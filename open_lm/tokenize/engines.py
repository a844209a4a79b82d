"""Where tasks run: processes of this machine, or a Ray cluster. Both only call `run_task`.

A task's result is written to the work folder when everything else of it is there, so a task that has a result is
never run again, and one that has none leaves nothing that another run of it does not replace.
"""

import json
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from open_lm.tokenize.folder import open_folder
from open_lm.tokenize.mapping import Encode, encode_unit
from open_lm.tokenize.reducing import Pack, Tails, WriteShard, join_tails, pack_bucket, write_shard

FUNCTIONS: dict[type, Callable[[Any], dict]] = {
    Encode: encode_unit,
    Pack: pack_bucket,
    Tails: join_tails,
    WriteShard: write_shard,
}
ATTEMPTS = 3  # starts of workers, when one of them dies (is killed, runs out of memory)


def run_task(task: Any) -> dict:
    """Runs a task and records its result."""
    result = FUNCTIONS[type(task)](task)
    text = json.dumps(result)
    open_folder(task.work, task.patience).write(f"{task.name}.json", text.encode())
    return json.loads(text)  # the same from here as from the file


def end_with_parent() -> None:
    """In a worker: when its parent is gone, however that ended, so is the worker, in the midst of a task. It must
    write nothing once another run may own the folders."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent").start()


class Engine(Protocol):
    """Runs tasks in any order; a context manager."""

    def __enter__(self) -> "Engine": ...

    def __exit__(self, *error, **names) -> bool | None: ...

    def run(self, tasks: Sequence[Any]) -> Iterator[tuple[Any, dict]]:
        """Tasks with their results, as they end. The first error ends it, as itself."""
        ...


class LocalEngine(ExitStack):
    """Processes of this machine; with one, this one."""

    def __init__(self, processes: int) -> None:
        super().__init__()
        self.processes = processes
        self.pool: ProcessPoolExecutor | None = None

    def run(self, tasks: Sequence[Any]) -> Iterator[tuple[Any, dict]]:
        if self.processes == 1:
            yield from ((task, run_task(task)) for task in tasks)
            return
        left = {task.name: task for task in tasks}
        for attempt in range(ATTEMPTS):
            if self.pool is None:
                context = multiprocessing.get_context(
                    "spawn"
                )  # nothing of this process can reach the workers
                self.pool = ProcessPoolExecutor(
                    self.processes, mp_context=context, initializer=end_with_parent
                )
                self.callback(self.pool.shutdown, cancel_futures=True)
            try:
                futures = {self.pool.submit(run_task, task): task for task in left.values()}
                for future in as_completed(futures):
                    task, result = futures[future], future.result()
                    del left[task.name]
                    yield task, result
                return
            except BrokenProcessPool:
                self.pool = None
                if attempt == ATTEMPTS - 1:
                    raise OSError(
                        f"a worker process died in each of {ATTEMPTS} attempts (out of memory? then fewer "
                        "--processes); started again with the same flags, the work goes on from here"
                    ) from None


class RayEngine(ExitStack):
    """A Ray cluster: a running one, or one that is started on this machine and ends with the engine."""

    def __init__(self, address: str | None, processes: int) -> None:
        super().__init__()
        try:
            import ray
        except ImportError as error:
            raise ImportError(f"--engine ray: {error} (pip install ray)") from error
        self.ray: Any = ray
        self.address, self.processes = address, processes

    def __enter__(self) -> "RayEngine":
        package = str(Path(__file__).parents[1])
        place = {"num_cpus": self.processes, "include_dashboard": False}
        if self.address is not None:  # other machines may lack this package, or have another version of it
            place = {"runtime_env": {"py_modules": [package]}}
        try:
            self.ray.init(self.address or "local", logging_level="warning", **place)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise OSError(f"--ray-address {self.address}: {error}") from error
        self.callback(self.ray.shutdown)
        return self

    def run(self, tasks: Sequence[Any]) -> Iterator[tuple[Any, dict]]:
        remote = self.ray.remote(num_cpus=1, max_retries=ATTEMPTS)(run_task)
        ahead = 2 * max(1, int(self.ray.cluster_resources().get("CPU", 1)))
        waiting, running = list(reversed(tasks)), {}
        try:
            while waiting or running:
                while waiting and len(running) < ahead:
                    task = waiting.pop()
                    running[remote.options(name=task.name).remote(task)] = task
                done, _ = self.ray.wait(list(running), num_returns=1)
                yield running.pop(done[0]), self.result(done[0])
        finally:
            for reference in running:
                self.ray.cancel(reference, force=True)

    def result(self, reference: Any) -> dict:
        """A task's result, or its own error."""
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
        except self.ray.exceptions.RayError as error:
            raise OSError(
                f"Ray: {error}; started again with the same flags, the work goes on from here"
            ) from error


def open_engine(name: str, processes: int, ray_address: str | None) -> Engine:
    """The engine of this name, not started yet."""
    return RayEngine(ray_address, processes) if name == "ray" else LocalEngine(processes)
