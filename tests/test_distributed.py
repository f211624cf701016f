"""Two processes on this machine give the single-process result; factorisations end on several devices."""

import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from sul_jax import energy, k_means

PROGRAM = """
import sys
import jax
import numpy as np
jax.config.update("jax_num_cpu_devices", 2)
port, index, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=index)
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from sul_jax import energy

assert jax.device_count() == 4
images = np.asarray(np.random.default_rng(0).random((16, 8, 8, 2)), np.float32)
window = {"kernel_size": 3, "padding": 1}
state = energy.init(jax.random.key(0), images, num_subspaces=5, rank=2, **window)
state = jax.tree.map(np.asarray, state)
mesh = Mesh(np.array(jax.devices()), ("batch",))
local = images[8 * index : 8 * index + 8]  # each process holds its own half of the batch
batch = jax.make_array_from_process_local_data(NamedSharding(mesh, P("batch")), local)
step = jax.jit(
    jax.shard_map(
        lambda s, x: energy.update(s, x, axis_name="batch", **window),
        mesh=mesh, in_specs=(P(), P("batch")), out_specs=P(),
    )
)
for _ in range(3):
    state, info = step(state, batch)

# Vectors of which one process has a chunk and the other three: their sums are those of all.
from sul_jax import k_means, training
vectors = np.random.default_rng(1).standard_normal((400, 5), np.float32)
parts = np.array_split(vectors, 4)
centers = k_means.KMeansState(vectors[:6], np.zeros(6, np.float32))
statistics, apply = jax.jit(k_means.statistics), jax.jit(k_means.apply)
for _ in range(3):
    centers, _ = apply(centers, training.sum_chunks(statistics, centers, (parts[:1], parts[1:])[index]))
if index == 0:
    np.savez(out, bases=np.asarray(state.bases), energy=np.asarray(info.energy), centers=centers.centroids)
"""


def test_two_processes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "out.npz"
    workers = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, str(port), str(index), str(out)])
        for index in range(2)
    ]
    try:
        assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    images = np.asarray(np.random.default_rng(0).random((16, 8, 8, 2)), np.float32)
    window = {"kernel_size": 3, "padding": 1}
    state = energy.init(jax.random.key(0), images, num_subspaces=5, rank=2, **window)
    step = jax.jit(lambda s, x: energy.update(s, x, **window))
    for _ in range(3):
        state, info = step(state, images)
    with np.load(out) as found:
        projectors = [np.einsum("krd,kre->kde", b, b) for b in (found["bases"], state.bases)]
        np.testing.assert_allclose(projectors[0], projectors[1], atol=1e-3)
        np.testing.assert_allclose(found["energy"], info.energy, rtol=1e-4)
        vectors = np.random.default_rng(1).standard_normal((400, 5), np.float32)
        centers = k_means.KMeansState(vectors[:6], np.zeros(6, np.float32))
        for _ in range(3):
            centers, _ = jax.jit(k_means.update)(centers, vectors)
        np.testing.assert_allclose(found["centers"], centers.centroids, atol=1e-5)


FACTORISATIONS = """
import sys
import jax
import numpy as np
jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from sul_jax import k_subspaces

vectors = jax.random.normal(jax.random.key(0), (200, 800))
everywhere = NamedSharding(Mesh(np.array(jax.devices()), ("batch",)), P())
vectors = jax.device_put(vectors, everywhere)
begin = jax.jit(lambda key, x: k_subspaces.init(key, x, num_subspaces=58, rank=16))
state = begin(jax.random.key(1), vectors)
state, _ = jax.jit(k_subspaces.update)(state, vectors)
state.bases.block_until_ready()
"""


@pytest.mark.parametrize("devices", [2, 4])
def test_factorisations_end_on_several_devices(devices: int) -> None:
    """With sizes as published: batches of them waited for each other's threads without end."""
    done = subprocess.run([sys.executable, "-c", FACTORISATIONS, str(devices)], timeout=120)
    assert done.returncode == 0
