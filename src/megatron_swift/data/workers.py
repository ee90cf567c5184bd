"""Work on chunks by several processes, with results in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from megatron_swift.utils.errors import DataError


def map_in_order(
    job: Callable[[Any], Any], chunks: Sequence[Any], *, num_proc: int, start_method: str | None = None
) -> Iterator[Any]:
    """job(chunk) of each chunk, in order, by `num_proc` processes; an exception in one is raised here.

    `job` is sent to each process once; chunk i is done by process i % num_proc, which may run ahead as far as its pipe
    has room.
    """
    if num_proc == 1 or len(chunks) < 2:
        yield from map(job, chunks)
        return
    context = multiprocessing.get_context(start_method)
    num_proc = min(num_proc, len(chunks))
    receivers: list[Connection] = []
    processes: list[Any] = []
    try:
        for number in range(num_proc):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(  # type: ignore[attr-defined]
                target=_serve, args=(job, chunks[number::num_proc], sender), daemon=True
            )
            process.start()
            sender.close()
            receivers.append(receiver)
            processes.append(process)
        for number in range(len(chunks)):
            try:
                result = receivers[number % num_proc].recv()
            except EOFError:
                process = processes[number % num_proc]
                process.join()
                why = f"it ended with code {process.exitcode}: it may have been killed for want of memory"
                raise DataError("a process that encodes rows died", why=why, do="lower --dataset_num_proc") from None
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        for process in processes:
            process.terminate()
            process.join()
        for receiver in receivers:
            receiver.close()


def _serve(job: Callable[[Any], Any], chunks: Sequence[Any], sender: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it ends us
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    try:
        for chunk in chunks:
            sender.send(job(chunk))
    except BrokenPipeError:
        return  # the parent has gone
    except Exception as error:  # raised again in the parent
        sender.send(error)
