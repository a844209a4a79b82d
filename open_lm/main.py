"""`torchrun … -m open_lm.main`: parse, set up, train or evaluate. The only place that knows the whole.

python -m open_lm.main --help
"""

import functools
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record

from open_lm import checkpoint
from open_lm.averaging import Average
from open_lm.checkpoint.start import remote_folder
from open_lm.checkpoint.sync import Sync
from open_lm.config.averaging import NONE, coefficients_of
from open_lm.config.check import check, starts_from_checkpoint, trains
from open_lm.config.parse import config_text, flag_values, parse
from open_lm.config.redact import redact
from open_lm.config.resolve import resolve_model
from open_lm.config.schedule import Schedule, divide_batch
from open_lm.config.survival import after_restart
from open_lm.data.cache import check_folder
from open_lm.data.errors import DataError
from open_lm.flops import FORMULA, peak_flops
from open_lm.job import Job, folder_of, leave_later, own, prepare
from open_lm.log import Log, logger
from open_lm.log.record import copy_code
from open_lm.metrics import Progress
from open_lm.model import count_parameters
from open_lm.nn.attention import kernel_of
from open_lm.optim import LossScale, make_optimizer
from open_lm.parallel import mesh
from open_lm.parallel.determinism import make_deterministic
from open_lm.parallel.gather import on_first_rank
from open_lm.parallel.launch import find_ranks
from open_lm.parallel.plan import compiles, compute_dtype, parallelize
from open_lm.parallel.process import Recorder, hide_arguments
from open_lm.parallel.refusal import agree, refusing
from open_lm.parallel.watch import StopAsked
from open_lm.saves import Saves
from open_lm.train import train
from open_lm.validation import evaluate_all, evaluate_average, find_owed_evaluation


def main(arguments: Sequence[str] | None = None, *, ends: bool = False) -> None:
    """Runs what the command line says. A contradiction in it ends the process: one message, status 2.

    `ends`: the process does nothing else afterwards; signals that come so late change its exit status no more.
    """
    with refusing():
        run, given = parse(sys.argv[1:] if arguments is None else arguments)
        notes = check(run, given)
        config = resolve_model(run.model, run.moe, given, complete=not starts_from_checkpoint(run))
        ranks = find_ranks(run.distributed)
        if not ranks.is_needed:
            print(f"rank {ranks.rank} is not needed with --preset-world-size {ranks.world_size}: it ends")
            return
        divide_batch(run.optim, ranks.world_size)
        if run.optim.deterministic:
            notes += make_deterministic()
    with refusing(every_rank=True):
        world = mesh.start(run.distributed)
    try:
        run, continued = after_restart(run, world.restarts, trains(run), mesh.has_begun(world))
        agree(lambda: check_folder(run.data))
        folder, job = folder_of(run, world), None
        owner = agree(lambda: own(run, folder, world))
        try:
            prepared = job = agree(lambda: prepare(run, config, given, world, folder, notes + continued))
            job = agree(lambda: leave_later(prepared))
            mesh.set_begun(world)
            execute(job)
        finally:
            if owner:
                owner.release(leave_nothing=job is None)
    finally:
        world.watch.leave_ranks()
        mesh.stop()
        world.watch.close(ends)


def command() -> None:
    """`main` as a process: what ends it is shown without secrets, also by torchrun, as its last words."""
    arguments, sys.argv = sys.argv, list(map(redact, sys.argv))
    hide_arguments(arguments)
    sys.excepthook = lambda kind, error, trace: print(show(error), file=sys.stderr, flush=True)
    record(functools.partial(main, ends=True), Recorder(show))(arguments[1:])


SAID = (DataError, checkpoint.SaveError)  # their message is all that a user needs


def show(error: BaseException) -> str:
    """What ended the run: of an error of data or of a save its message, of others the traceback; no secrets."""
    if isinstance(error, SAID):
        where = f" (where it was raised: {error.written_to})" if error.written_to else ""
        return redact(f"open_lm.main: error: {error}") + where
    return redact("".join(traceback.format_exception(error))).removesuffix("\n")


def execute(job: Job) -> None:
    """Trains, or evaluates once, with a log open. Exit status 3: done, but not all is copied to --remote-sync."""
    run, world = job.run, job.world
    log = agree(lambda: Log(job.folder, rank=world.rank, local=run.log.log_local, debug=run.log.debug))
    total, active = count_parameters(job.config)
    written, sync, copied = checkpoints_before(job), None, True
    world.watch.folder, world.watch.tell = str(job.folder), log.failure
    mesh.record_collectives(str(job.folder))
    try:
        facts = {
            "parameters": total,
            "active_parameters": active,
            "world_size": world.world_size,
            "device": device_name(world.device),
            "torch": torch.__version__,
        }
        agree(lambda: log.describe(flag_values(run), config_text(run, job.given), **facts))
        if run.log.copy_codebase and world.rank == 0:
            copy_code(job.folder)
        for note in job.notes:
            logger.warning(note)
        logger.info(
            f"{job.folder} | {run.model.model}: {total:,} parameters, {active:,} active | "
            f"{world.world_size} rank{'s' * (world.world_size > 1)} on {device_name(world.device)}"
        )
        dtype = compute_dtype(run.distributed, run.optim.precision)
        settled = "torchcompile" in job.given or job.schedule is None or run.optim.deterministic
        compiling = compiles(run.model.torchcompile if settled else None, world.device, world.world_size)
        kernel = f"attention's kernel: {kernel_of(job.config, world.device, dtype)}, in {str(dtype)[6:]}"
        logger.info(f"{kernel}; torch.compile: {'on' if compiling else 'off'}")
        if says_mfu(world.device):
            logger.info(FORMULA)
        sync = start_sync(job, written)
        model = parallelize(
            job.config, world=world, distributed=run.distributed, precision=run.optim.precision,
            seed=run.optim.seed,
            grad_checkpointing=run.model.grad_checkpointing, torchcompile=compiling,
            meta=not run.model.disable_meta_device,
        )  # fmt: skip
        for name, parameter in model.named_parameters():
            logger.debug("%s: %s %s", name, tuple(parameter.shape), parameter.dtype)
        if job.schedule is None:
            evaluate_once(job, model, log)
        else:
            train_all(job, job.schedule, model, log, sync, written)
    except StopAsked:
        goes_on = "the same command with --resume latest goes on" if job.schedule else "it is given up"
        logger.info("stopped by %s; %s", world.watch.why(), goes_on)
    except SystemExit as end:  # `refusing` has said why
        if end.__cause__ is not None:
            log.failure(str(end.__cause__))
        raise
    except Exception as error:
        written_to, text = log.traceback(error), f"{type(error).__name__}: {error}"
        if isinstance(error, SAID):
            error.written_to, text = written_to, str(error)
        log.failure(text)
        world.watch.fail(error)
        raise
    finally:
        failed = sys.exc_info()[0] is not None
        world.watch.rest()
        log.close_metrics(failed)  # what they still held belongs into the last copy
        if sync is not None:
            copied = sync.close()
        log.close(failed)
    if not copied:
        raise SystemExit(3)


def says_mfu(device: torch.device) -> bool:
    """Whether log lines hold MFU."""
    return device.type == "cuda" and peak_flops(torch.cuda.get_device_name(device)) is not None


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def evaluate_once(job: Job, model: nn.Module, log: Log) -> None:
    """`--val-data … --resume …` without training data. Results go beside the checkpoint, as open_lm's.

    With --averagers these alone are evaluated, as open_lm does; the weights themselves if `none` is among them.
    """
    assert job.start is not None
    log.begin(job.run.log.targets, flag_values(job.run))
    if job.run.averaging.average:
        load_soup(job, model)
        evaluate_all(job, model, log, Progress(), job.start.name)
        return
    with refusing():
        saved = checkpoint.load_weights(job.start.file, model)
    progress = Progress(step=saved.get("step") or 0, tokens=saved.get("tokens") or 0)
    if not job.averagers or NONE in (job.run.averaging.averagers or "").split(","):
        evaluate_all(job, model, log, progress, job.start.name)
    for averager in job.averagers:
        average = Average(averager, model)
        with refusing():
            checkpoint.load_averages(job.start.file, [average], model)
        evaluate_average(job, model, average, log, progress, job.start.name)
    if job.world.is_first:
        job.start.discard()


def load_soup(job: Job, model: nn.Module) -> None:
    """The weights of --average into `model`."""
    assert job.start is not None
    paths, coefficients = job.run.averaging.average or (), coefficients_of(job.run.averaging)
    with refusing():
        checkpoint.load_soup(job.start.soup, coefficients, model)
    terms = (f"{c:g} * {path}" for c, path in zip(coefficients, paths, strict=True))
    logger.info("weights: %s", " + ".join(terms))


def load_averages(job: Job, averages: Sequence[Average], model: nn.Module, step: int) -> None:
    """The averages beside the checkpoint that is resumed; one that it lacks starts at its weights."""
    assert job.start is not None
    file = job.start.file
    with refusing():
        folder = mesh.broadcast_object(on_first_rank(lambda: checkpoint.state_of(Path(file))))
        missing = checkpoint.load_averages(folder or file, averages, model)
    for name in missing:
        logger.warning(
            "--averagers %s: %s was saved without it: the average starts from the weights of step %d",
            name, job.start.name, step,
        )  # fmt: skip


def checkpoints_before(job: Job) -> list[str]:
    """Labels of the checkpoints, oldest first, that --delete-previous-checkpoint may delete once there is a newer
    one: those that the run wrote under this flag, and the one it goes on from."""
    folder = job.folder / "checkpoints"
    if job.start is None or job.start.state is None or not job.start.lies_in(folder):
        return []
    before = list(job.start.state.get("written", []))
    if checkpoint.is_state(Path(job.start.file)):
        return before
    label = Path(job.start.file).stem.removeprefix("epoch_")
    before = [each for each in job.start.state.get("written", []) if each != label]
    return before if label == checkpoint.LATEST else [*before, label]


def start_sync(job: Job, written: list[str]) -> Sync | None:
    """Copies to --remote-sync from now on; on rank 0, while training."""
    options, remote = job.run.checkpoint, remote_folder(job.run, job.folder)
    if remote is None or job.schedule is None or job.world.rank:
        return None
    deletable = written if options.delete_previous_checkpoint else None
    return Sync(
        job.folder,
        remote,
        every_seconds=options.remote_sync_frequency,
        written=deletable,
        keep_every=options.keep_every,
    )


def train_all(
    job: Job, schedule: Schedule, model: nn.Module, log: Log, sync: Sync | None, written: list[str]
) -> None:
    """The whole run: restore, train, save and evaluate at the end of every interval.

    `written` are the labels of the run's checkpoints so far, for --delete-previous-checkpoint.
    """
    run, world, data = job.run, job.world, job.train_data
    assert data is not None
    optimizer = make_optimizer(model, run.optim)
    loss_scale = LossScale() if run.optim.precision in ("amp", "fp16") else None
    progress = Progress()
    if job.start and job.start.soup:
        load_soup(job, model)
    elif job.start and job.start.state is None:
        with refusing():
            checkpoint.load_weights(job.start.file, model)
        logger.info("weights from %s, a new optimizer at step 0", job.start.name)
    elif job.start:
        with refusing():
            state = checkpoint.load_training_state(job.start.file, model, optimizer)
        progress = Progress(**state["progress"])
        if loss_scale and state["loss_scale"]:
            loss_scale.load_state_dict(state["loss_scale"])
        logger.info("resumed %s at step %d, %d tokens", job.start.name, progress.step, progress.tokens)
    averages = [Average(averager, model) for averager in job.averagers]
    if job.start and job.start.state is not None:
        load_averages(job, averages, model, progress.step)
    if job.start and world.is_first:
        job.start.discard()
    log.begin(run.log.targets, flag_values(run), progress.step)
    folder = job.folder / "checkpoints"

    def evaluate_interval(n: int) -> None:
        path = str(folder / f"epoch_{n}.pt")
        evaluate_all(job, model, log, progress, path)
        for average in averages:
            evaluate_average(job, model, average, log, progress, path)

    if owed := mesh.broadcast_object(find_owed_evaluation(job, schedule, progress.step)):
        logger.info("step %d has a checkpoint but no evaluation: evaluated now", progress.step)
        evaluate_interval(owed)
    if progress.step >= schedule.end_step:
        logger.info("nothing left to do: %d of %d steps are done", progress.step, schedule.end_step)
        on_first_rank(lambda: checkpoint.check_made(folder))
        return

    saves = Saves(
        job, model, optimizer, progress, log,
        loss_scale=loss_scale, averages=averages, sync=sync, written=written,
    )  # fmt: skip

    def end_interval(n: int) -> None:
        last = progress.step == schedule.end_step
        evaluates = bool(job.val_data) and (last or n % run.eval.val_frequency == 0)
        saves.end_interval(n, last, evaluates)
        if evaluates:
            saves.saver.before_update()  # averages take the weights' place
            evaluate_interval(n)

    with saves:
        train(
            model,
            optimizer,
            data.batches(progress.step, schedule.end_step),
            progress,
            config=job.config,
            optim=run.optim,
            schedule=schedule,
            plan=job.batch,
            world=world,
            log=log,
            log_every_n_steps=run.log.log_every_n_steps,
            log_logit_mean=run.log.log_logit_mean,
            loss_scale=loss_scale,
            end_interval=end_interval,
            save_if_due=saves.if_due,
            before_update=saves.saver.before_update,
            save_state=saves.save_state,
            name_samples=data.name_samples,
            averages=averages,
            averaged_loss_every=run.averaging.log_avg_model_training_loss,
            bad_sample_limit=run.data.bad_sample_limit,
        )


if __name__ == "__main__":
    command()
