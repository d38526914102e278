"""What `import pallas_gemma.kernels` does, and leaves for later."""

import json
import subprocess
import sys

SCRIPT = """
import json, sys
import jax, jax.numpy, jax.experimental.pallas.tpu

events, opened, before = [], [], set(sys.modules)
jax.monitoring.register_event_duration_secs_listener(
  lambda name, *_, **__: events.append(name)
)
sys.addaudithook(
  lambda event, args: opened.append(str(args[0])) if event == "open" else None
)
import pallas_gemma.kernels

seen = list(events)
jax.eval_shape(lambda x: x + 1, 1.0)
tables = [path for path in opened if path.endswith(".json")]
rooms = {name.split(".")[0] for name in set(sys.modules) - before}
print(json.dumps([seen, len(events) > len(seen), tables, sorted(rooms)]))
"""


def test_importing_the_kernels_traces_and_reads_nothing():
  """Shapes of cases are numbers, tables are read when a kernel asks for them,
  and no module but jax's, the library's and our own comes along.
  """
  run = [sys.executable, "-P", "-c", SCRIPT]
  out = subprocess.run(run, capture_output=True, text=True, check=True).stdout
  events, is_seen, tables, rooms = json.loads(out)
  assert is_seen, "tracing is no longer an event: this test sees nothing"
  assert not events
  assert not tables
  ours = set(sys.stdlib_module_names) | {"jax", "pallas_gemma"}
  assert set(rooms) <= ours, set(rooms) - ours
