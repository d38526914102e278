"""A run whose directory is on another machine loses nothing either."""

import contextlib
import json
import os
import pathlib
import sys
import time
import zlib
from typing import Any

import fsspec
import numpy as np
import pytest
from faulty import Faulty, Killed
from flax import nnx
from lockstep import Lockstep
from pallas_gemma.gemma import (
  Tokenizer,
  TrainConfig,
  UserError,
  best_step,
  load_checkpoint,
  main,
  plot_runs,
  read_metrics,
  read_record,
)
from small_gemma import printed as run
from test_train_safe import (
  STEPS,
  config,
  numbers,
  room,
)

pytestmark = [
  pytest.mark.no_interpreter,
  pytest.mark.usefixtures("compiled_once", "traced_once"),
]


steps, mirrors = room("_checkpoint.steps"), room("_checkpoint.mirror")
leases = room("_lease")
remote_steps = room("_checkpoint.remote").remote_steps
checksums = room("_checkpoint.checksums")
put_checksums, write_checksums = (
  checksums.put_checksums,
  checksums.write_checksums,
)
place_of = room("_remote").place_of

URL = "faulty://bucket/run"
PLACE = place_of(URL, "work directory")


@pytest.fixture(autouse=True)
def empty():
  """Nothing is there, and nothing fails."""
  Faulty.reset()
  yield
  Faulty.reset()


# --- a mirror ---


class Machine:
  """A machine that works for the same URL; its steps hold their number."""

  def __init__(self, home: pathlib.Path, keep: int = 1):
    self.home, self.keep = home, keep
    self.said: list[str] = []
    home.mkdir(exist_ok=True)

  @contextlib.contextmanager
  def works(self):
    lease = leases.Lease(PLACE, self.home / "lease")
    mirror = mirrors.Mirror(PLACE, self.home, lease, self.keep)
    try:
      mirror.pull(self.said.append)
      yield mirror
    except Killed:  # which gives nothing back
      lease._ended.set()
      raise
    except BaseException:
      lease.__exit__()
      raise
    lease.__exit__()

  def save(self, mirror, step: int, loss: float | None = None) -> None:
    directory = mirror.directory
    (directory / "tokenizer.model").write_text("tokenizer")
    (directory / "config.json").write_text("{}")
    with open(directory / "metrics.jsonl", "a") as file:
      file.write(json.dumps({"step": step}) + "\n")
    with steps.new_folder(directory, step) as folder:
      (folder / "params").mkdir()
      for name in ("params/a", "record.json"):
        (folder / name).write_text(f"{name} {step}")
      write_checksums(folder)
      if loss is not None:
        steps.write_loss(folder, loss)
      steps.publish(folder, directory, step)
    steps.prune(directory, self.keep, step)
    mirror.push()

  def holds(self, mirror) -> list[int]:
    """The steps that are complete here, each with what it is to have."""
    folders = steps.complete_folders(mirror.directory)
    for step, folder in folders.items():
      for name in ("params/a", "record.json"):
        assert (folder / name).read_text() == f"{name} {step}"
    return sorted(folders)


def there() -> list[int]:
  return sorted(remote_steps(PLACE)[0])


def files_there() -> set[str]:
  return {name.removeprefix("/bucket/run/") for name in Faulty.store}


def saves(machine: Machine) -> None:
  with machine.works() as mirror:
    machine.save(mirror, 1, loss=1.0)
    machine.save(mirror, 2, loss=3.0)
    machine.save(mirror, 3)


@pytest.mark.parametrize("how", ["killed", "failing for good", "failing once"])
def test_wherever_an_upload_ends_a_complete_step_is_there(
  how, tmp_path, monkeypatch
):
  """At each change of what is there, in turn; then another machine goes on, or
  the same one.
  """
  monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no power fails
  saves(Machine(tmp_path / "count"))
  total = Faulty.changes
  assert there() == [1, 3]  # the best, and the newest
  whole = files_there()
  was_there = False
  for limit in range(1, total):
    Faulty.reset()
    error = Killed() if how == "killed" else OSError("the network is gone")
    Faulty.fails_after(limit, error, lasts=how != "failing once")
    machine = Machine(tmp_path / f"{how} {limit}")
    with contextlib.suppress(Killed, UserError):
      saves(machine)
    Faulty.limit = None
    left = there()
    assert left or not was_there
    was_there |= bool(left)
    Faulty.store.pop("/bucket/run/lease.json", None)  # it is old by then
    copy = dict(Faulty.store)
    with (other := Machine(tmp_path / f"other {how} {limit}")).works() as m:
      newest = left[-1] if left else None
      assert other.holds(m) == left[-1:]
      known = ("half uploaded", "fetching step")
      assert all(any(words in text for words in known) for text in other.said)
      other.save(m, 4)
      assert there()[-1] == 4 and set(there()) <= {newest, 1, 4}
    Faulty.store.clear()
    Faulty.store.update(copy)
    with machine.works() as m:
      own = machine.holds(m)
      assert own[-1:] >= left[-1:]
      m.finish()
      assert there()[-1:] == own[-1:]
      machine.save(m, 3)
    assert there() == [1, 3] and files_there() == whole


def test_what_could_not_be_uploaded_is_said_and_goes_up_later(tmp_path):
  machine = Machine(tmp_path / "a")
  with machine.works() as mirror:
    machine.save(mirror, 1)
    Faulty.fails_after(0, OSError("the network is gone"))
    machine.save(mirror, 2)
    machine.save(mirror, 3)
    (said,) = machine.said
    assert "not uploaded: work directory faulty://bucket/run: cannot" in said
    assert there() == [1]
    with pytest.raises(UserError, match=f"gone; what .* is in {tmp_path}/a/ru"):
      mirror.finish()
    Faulty.limit = None
    machine.save(mirror, 4)
    assert there() == [4] and "uploaded to" in machine.said[-1]
    Faulty.fails_after(0, OSError("the network is gone"))
    machine.save(mirror, 5)
  Faulty.limit = None
  with machine.works() as mirror:
    assert "step 5 is on this machine alone" in machine.said[-1]
    mirror.finish()
  assert there() == [5]


def test_what_another_machine_did_meanwhile_is_what_counts(tmp_path):
  one, two = Machine(tmp_path / "one"), Machine(tmp_path / "two")
  with one.works() as mirror:
    one.save(mirror, 1)
    Faulty.fails_after(0, OSError("the network is gone"))
    one.save(mirror, 2)
  Faulty.limit = None
  with two.works() as mirror:
    two.save(mirror, 3)
  with one.works() as mirror:
    assert one.holds(mirror) == [3]
    lines = (mirror.directory / "metrics.jsonl").read_text().splitlines()
    assert list(map(json.loads, lines)) == [{"step": 1}, {"step": 3}]
    old = one.home / "run.old"
    assert one.said[-1] == f"fetching step 3 from {URL} ..."
    assert "has step 3, of another run or machine than what" in one.said[-2]
    assert f"now {old}; going on from {URL}" in one.said[-2]
    assert (old / "checkpoints" / "2" / "params" / "a").exists()
  Faulty.store.clear()  # as the user may remove it
  with one.works() as mirror:
    assert one.holds(mirror) == [] and "has no step" in one.said[-1]


def test_a_damaged_step_is_named_and_one_of_this_machine_is_mended(tmp_path):
  machine = Machine(tmp_path / "a")
  with machine.works() as mirror:
    machine.save(mirror, 1)
  path = machine.home / "run" / "checkpoints" / "1" / "params" / "a"
  path.write_text("changed")
  with machine.works() as mirror:
    assert machine.holds(mirror) == [1]
  name = "/bucket/run/checkpoints/1/params/a"
  memory = fsspec.filesystem("faulty")
  memory.pipe_file(name, memory.cat_file(name)[:-1] + b"x")
  with pytest.raises(UserError, match=f"{URL}/checkpoints/1/params/a: damaged"):
    with Machine(tmp_path / "b").works():
      pass
  memory.rm_file(name)
  with pytest.raises(UserError, match=f"{URL}/checkpoints/1: a file is miss"):
    with Machine(tmp_path / "b").works():
      pass


def test_damaged_checksums_are_named_and_cut_ones_were_on_their_way(tmp_path):
  machine = Machine(tmp_path / "a", keep=2)
  with machine.works() as mirror:
    machine.save(mirror, 1)
    machine.save(mirror, 2)
  name = "/bucket/run/checkpoints/2/checksums.json"
  memory = fsspec.filesystem("faulty")
  whole = memory.cat_file(name)
  memory.pipe_file(name, whole.replace(b":", b";", 1))
  with pytest.raises(UserError, match=f"{URL}/checkpoints/2/checksums.json: d"):
    with Machine(tmp_path / "b").works():
      pass
  assert there() == [1, 2]
  memory.pipe_file(name, whole[:-2])
  with Machine(tmp_path / "b").works() as mirror:
    assert there() == machine.holds(mirror) == [1]


def test_a_lost_config_is_named_where_it_was(tmp_path):
  machine = Machine(tmp_path / "a")
  with machine.works() as mirror:
    machine.save(mirror, 1)
  fsspec.filesystem("faulty").rm_file("/bucket/run/config.json")
  message = f"work directory {URL}: it has step 1, and no config.json"
  with pytest.raises(UserError, match=message):
    with Machine(tmp_path / "b").works():
      pass


# --- several processes, each with its parts ---


class Process(Machine):
  """One of two: its steps hold its number too."""

  def __init__(self, home: pathlib.Path, index: int):
    super().__init__(home)
    self.index = index
    self.lease: Any = None
    if not index:
      self.lease = leases.Lease(PLACE, home / "lease")
    self.mirror = mirrors.Mirror(PLACE, home, self.lease, keep=1)

  def save(self, mirror, step: int, loss=None) -> None:
    parts = {f"params/{i}": f"{step} of {i}".encode() for i in range(2)}
    marks = {n: (len(x), zlib.crc32(x)) for n, x in parts.items()}
    (mirror.directory / "tokenizer.model").write_text("tokenizer")
    (mirror.directory / "config.json").write_text("{}")
    with steps.new_folder(mirror.directory, step) as folder:
      (folder / "params").mkdir()
      own = f"params/{self.index}"
      (folder / own).write_bytes(parts[own])
      put_checksums(folder, marks)
      steps.publish(folder, mirror.directory, step)
    steps.prune(mirror.directory, self.keep, step)
    mirror.push()

  def held(self) -> dict[int, list[str]]:
    folders = steps.complete_folders(self.mirror.directory)
    return {
      step: [path.read_text() for path in sorted(folder.glob("params/*"))]
      for step, folder in folders.items()
    }


def test_several_processes_upload_their_parts(tmp_path, monkeypatch):
  threads = Lockstep()
  threads.replace(monkeypatch, mirrors)

  def begin(*homes: str) -> list[Process]:
    both = [Process(tmp_path / home, i) for i, home in enumerate(homes)]
    assert threads.run(lambda i: both[i].mirror.pull(both[i].said.append)) == [
      "",
      "",
    ]
    return both

  def end(both: list[Process]) -> list[str]:
    errors = threads.run(lambda i: both[i].mirror.finish())
    both[0].lease.__exit__()
    return errors

  def save(both: list[Process], step: int) -> list[str]:
    return threads.run(lambda i: both[i].save(both[i].mirror, step))

  both = begin("a", "b")
  assert save(both, 1) == save(both, 2) == ["", ""]
  assert there() == [2] and {"checkpoints/2/params/1"} < files_there()
  # What one of them cannot upload, none of them has uploaded.
  upload, place = type(PLACE).upload, type(PLACE)

  def fails(self, sources):
    if threads.own.index == 1:
      raise UserError("the network is gone")
    upload(self, sources)

  monkeypatch.setattr(place, "upload", fails)
  assert save(both, 3) == ["", ""] and there() == [2]
  assert "process 1 failed: the network is gone" in both[0].said[0]
  assert all("the network is gone; what is n" in text for text in end(both))
  # As both still have it, it goes up at the next start; else it is none.
  monkeypatch.setattr(place, "upload", upload)
  both = begin("a", "b")
  whole = {3: ["3 of 0", "3 of 1"]}
  assert there() == [3] and both[0].held() == both[1].held() == whole
  monkeypatch.setattr(place, "upload", fails)
  assert save(both, 4) == ["", ""] and end(both)[0]
  monkeypatch.setattr(place, "upload", upload)
  both[0].lease.__exit__()
  both = begin("a", "c")
  assert there() == [3] and both[0].held() == both[1].held() == whole
  assert any("going on from" in text for text in both[0].said)
  assert save(both, 5) == ["", ""] and there() == [5]
  # One process alone cannot use what two have not uploaded.
  monkeypatch.setattr(place, "upload", fails)
  assert save(both, 6) == ["", ""] and end(both)[0]
  monkeypatch.undo()
  alone = Machine(tmp_path / "a")
  with alone.works() as mirror:
    assert any("has step 5, of another run" in text for text in alone.said)
    (folder,) = steps.complete_folders(mirror.directory).values()
    assert (folder / "params" / "1").read_text() == "5 of 1"


# --- one writer ---


def test_a_second_writer_is_refused_until_the_first_one_is_dead(tmp_path):
  own = [tmp_path / name for name in "abc"]
  first = leases.Lease(PLACE, own[0])
  named = rf"{URL}: in use by process {os.getpid()} on .*, since 2.*; wait for"
  with pytest.raises(UserError, match=named):
    leases.Lease(PLACE, own[1])
  first.check()
  # Killed: the last sign of life grows old.
  first._ended.set()
  lease = json.loads(PLACE.read("lease.json"))
  for age, dead in ((leases.STALE - 30, False), (leases.STALE + 1, True)):
    told = lease | {"time": lease["time"] - age}
    PLACE.write("lease.json", json.dumps(told).encode())
    if not dead:
      with pytest.raises(UserError, match="its lease ends in (29|30) seconds"):
        leases.Lease(PLACE, own[1])
  with leases.Lease(PLACE, own[1]) as second:
    second.check()
    with pytest.raises(
      leases.LeaseLostError, match="was taken over by process"
    ):
      first.check()
    first.__exit__()  # which is not its own any more
    second.check()
    PLACE.remove("lease.json")  # by hand
    second.check()
    assert PLACE.read("lease.json")
  assert PLACE.read("lease.json") is None


def test_a_lease_that_is_gone_may_have_been_anothers(tmp_path):
  with leases.Lease(PLACE, tmp_path / "a") as slept:
    slept._alive -= leases.STALE + 1
    slept.check()  # it is there, and its own
    slept._alive -= leases.STALE + 1
    PLACE.remove("lease.json")
    with pytest.raises(leases.LeaseLostError, match="and given it back"):
      slept.check()
  ahead = {"id": "x", "time": time.time() + 1e6}
  PLACE.write("lease.json", json.dumps(ahead).encode())
  with pytest.raises(UserError, match=f"delete {URL}/lease.json, .* clocks"):
    leases.Lease(PLACE, tmp_path / "a")


@pytest.mark.parametrize("beats", [False, True])
def test_a_place_that_was_emptied_gets_all_of_it_again(beats, tmp_path):
  machine = Machine(tmp_path / "a", keep=2)
  with machine.works() as mirror:
    machine.save(mirror, 1, loss=1.0)
    before = files_there()
    Faulty.store.clear()
    if beats:
      mirror._lease.check()
    machine.save(mirror, 2)
    assert files_there() > before and there() == [1, 2]
  with (other := Machine(tmp_path / "b")).works() as mirror:
    assert other.holds(mirror) == [2]


def test_who_has_lost_the_lease_writes_nothing_more(tmp_path):
  machine = Machine(tmp_path / "a")
  with machine.works() as mirror:
    machine.save(mirror, 1)
    lease = json.loads(PLACE.read("lease.json")) | {"id": "x", "host": "other"}
    PLACE.write("lease.json", json.dumps(lease).encode())
    before = files_there()
    for write in (lambda: machine.save(mirror, 2), mirror.finish):
      with pytest.raises(leases.LeaseLostError, match="taken over by .* other"):
        write()
  assert files_there() == before and json.loads(PLACE.read("lease.json"))


def test_a_machine_that_starts_again_need_not_wait(tmp_path):
  killed = leases.Lease(PLACE, tmp_path / "a")
  killed._ended.set()
  with leases.Lease(PLACE, tmp_path / "a") as lease:
    lease.check()
    PLACE.write("lease.json", b"{")  # cut by a process that was killed
    with leases.Lease(PLACE, tmp_path / "b"):
      with pytest.raises(leases.LeaseLostError):
        lease.check()


# --- runs ---


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """The directory of an undisturbed run on this machine."""
  directory = tmp_path_factory.mktemp("runs") / "finished"
  run(config(directory))
  return directory


def on(machine: pathlib.Path, url: str = URL, **changes) -> TrainConfig:
  """A run for the URL on a machine, whose cache it is."""
  return config(pathlib.Path(url), cache_dir=machine, keep=1, **changes)


def home(machine: pathlib.Path) -> pathlib.Path:
  (found,) = (machine / "work").iterdir()
  return found


def test_a_run_that_was_killed_goes_on_on_another_machine(
  finished, tmp_path, monkeypatch, capfd
):
  loop = room("_train.loop").Loop
  take_step = loop.take_step

  def dies(self):
    if self.step == 7:
      self._checkpoints.finish()
      raise Killed
    take_step(self)

  monkeypatch.setattr(loop, "take_step", dies)
  with pytest.raises(Killed):
    run(on(tmp_path / "a"))
  monkeypatch.undo()
  text = run(on(tmp_path / "b"))
  assert "4 done" in text and f"work      {URL}; on this machine" in text
  here = home(tmp_path / "b") / "run"
  assert numbers(here) == numbers(finished)
  there = {r["step"]: r["loss"] for r in read_metrics(URL)}
  assert there == {r["step"]: r["loss"] for r in read_metrics(finished)}
  assert "complete: 12 of 12 steps in faulty://bucket/run" in run(
    on(tmp_path / "a")
  )
  # What reads it, by the same URL.
  assert read_record(URL, STEPS) == read_record(here, STEPS)
  best = best_step(URL)
  assert best is not None and f"best checkpoint: step {best}" in text
  one, two = load_checkpoint(URL), load_checkpoint(here)
  leaves = [nnx.to_flat_state(nnx.state(m, nnx.Param)) for m, _ in (one, two)]
  for x, y in zip(*leaves, strict=True):
    np.testing.assert_array_equal(x[1][...], y[1][...])
  assert one[1].model == two[1].model
  assert Tokenizer.load(f"{URL}/tokenizer.model").model == two[1].model
  picture = plot_runs([URL, finished], tmp_path / "losses.png")
  assert picture.read_bytes().startswith(b"\x89PNG")
  with pytest.raises(UserError, match=f"{URL}: no complete step 5; it has "):
    load_checkpoint(URL, step=5)
  capfd.readouterr()
  with pytest.raises(SystemExit) as end:
    main(["sample", "--checkpoint", URL, "--max-new-tokens", "1"])
  assert end.value.code == 0


def test_a_run_goes_on_without_the_network_and_says_so(finished, tmp_path):
  machine = tmp_path / "a"
  Faulty.fails_after(30, OSError("the network is gone"))
  with pytest.raises(
    UserError, match="gone; what is not uploaded is in /.*run"
  ):
    run(on(machine))
  here = home(machine) / "run"
  assert numbers(here) == numbers(finished) and there() != [STEPS]
  Faulty.limit = None
  text = run(on(machine))
  assert f"step {STEPS} is on this machine alone" in text
  assert there()[-1] == STEPS
  assert read_metrics(URL) == read_metrics(here)


def test_a_second_run_is_refused(tmp_path):
  assert TrainConfig(work_dir=URL) == TrainConfig(work_dir=pathlib.Path(URL))
  with leases.Lease(PLACE, tmp_path / "other"):
    with pytest.raises(UserError, match=f"{URL}: in use by process"):
      run(on(tmp_path / "a"))
  assert files_there() == set()


@pytest.mark.parametrize("option", ["--work-dir", "--tokenizer"])
def test_what_is_missing_is_said_at_the_door(
  option, tmp_path, monkeypatch, capfd
):
  monkeypatch.chdir(tmp_path)

  def refused(url: str) -> str:
    with pytest.raises(SystemExit) as end:
      main(["train", option, url, "--cache-dir", str(tmp_path / "cache")])
    error = capfd.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    return error

  monkeypatch.setitem(sys.modules, "gcsfs", None)
  assert "gs://bucket/x: " in (said := refused("gs://bucket/x"))
  assert "gcsfs" in said
  Faulty.unreachable = True
  assert f"{URL}: cannot be reached: no credentials" in refused(URL)
  monkeypatch.setitem(sys.modules, "fsspec", None)
  assert "pip install 'pallas-gemma[remote]'" in refused("memory://x")
  assert {path.name for path in tmp_path.iterdir()} <= {"cache", "runs"}


@pytest.mark.parametrize("scheme", ["https", "HTTP"])
def test_a_place_that_only_gives_is_no_work_directory(scheme, capfd):
  with pytest.raises(SystemExit) as end:
    main(["train", "--work-dir", f"{scheme}://example.com/run"])
  error = capfd.readouterr().err
  assert end.value.code == 2 and error.count("\n") == 1
  message = f"{scheme}://example.com/run: cannot be written to; give a path"
  assert message in error


@pytest.mark.parametrize("url", ["gs://", "gs:", "file://", "memory:///"])
def test_a_scheme_alone_is_no_place(url):
  """Without its slashes it would be a folder of this machine."""
  with pytest.raises(UserError, match="wanted a bucket or folder after"):
    place_of(url, "work directory")
