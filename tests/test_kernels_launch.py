"""What a launch hands to the driver, byte by byte."""

import ctypes
import threading

import numpy as np
import pytest
import torch

from expertmesh.errors import KernelError
from expertmesh.kernels import launch as module
from expertmesh.kernels.launch import Config, Struct, launch


class Driver:
    """Keeps what it is called with, copied as the real one does."""

    def __init__(self, num_arguments, code=0):
        self.num_arguments, self.code, self.calls = num_arguments, code, []
        self.sizes, self.structs = {}, []  # bytes of the arguments that are structs

    def __call__(self, config, function, pointers, extra):
        copied = Config.from_buffer_copy(ctypes.string_at(config, ctypes.sizeof(Config)))
        addresses = (ctypes.c_void_p * self.num_arguments).from_address(pointers)
        self.calls.append((copied, function, [ctypes.string_at(a, 8) for a in addresses], extra))
        self.structs = [ctypes.string_at(addresses[i], size) for i, size in self.sizes.items()]
        return self.code


@pytest.fixture
def driver(monkeypatch):
    made = Driver(9)
    monkeypatch.setattr(module, "_launch_call", lambda: made)
    return made


OPTIONS = {"stream": 77, "shared_bytes": 1 << 17, "overlap": True, "name": "some_kernel"}


def test_arguments_lie_where_the_kernel_reads_them(driver):
    tensor = torch.arange(5)
    arguments = (
        tensor,
        None,
        np.int32(-7),
        np.int64(-(1 << 40)),
        np.float32(1.5e-6),
        0xDEADBEEF00,
        np.uint8(250),
        np.uint32(4_000_000_000),
        torch.nn.Parameter(torch.zeros(2)),
    )
    launch(4242, (3, 2), 256, arguments, **OPTIONS)
    ((config, function, read, extra),) = driver.calls
    assert (function, extra) == (4242, None)
    assert read[0] == tensor.data_ptr().to_bytes(8, "little")
    assert read[1] == bytes(8)
    assert read[2][:4] == np.int32(-7).tobytes()
    assert read[3] == np.int64(-(1 << 40)).tobytes()
    assert read[4][:4] == np.float32(1.5e-6).tobytes()
    assert read[5] == (0xDEADBEEF00).to_bytes(8, "little")
    assert read[6][:1] == bytes([250])
    assert read[7][:4] == np.uint32(4_000_000_000).tobytes()
    assert read[8] == arguments[8].data_ptr().to_bytes(8, "little")
    assert (config.grid_x, config.grid_y, config.grid_z) == (3, 2, 1)
    assert (config.block_x, config.block_y, config.block_z) == (256, 1, 1)
    assert (config.shared_bytes, config.stream, config.num_attributes) == (1 << 17, 77, 1)
    attribute = config.attributes.contents
    assert (attribute.id, attribute.value[:1]) == (6, b"\x01")  # programmatic stream serialization


def test_nothing_of_a_launch_stays_for_the_next(driver):
    launch(1, (9, 8, 7), 64, [np.int64(-1)] * 9, **OPTIONS)
    launch(2, (1,), 32, [None] * 9, **{**OPTIONS, "overlap": False, "shared_bytes": 0, "stream": 0})
    config, _, read, _ = driver.calls[1]
    assert read == [bytes(8)] * 9
    assert (config.grid_x, config.grid_y, config.grid_z, config.block_x) == (1, 1, 1, 32)
    assert (config.shared_bytes, config.stream, config.num_attributes) == (0, None, 0)


def test_a_struct_is_read_whole_and_its_place_is_free_for_the_next_launch(driver):
    packed = bytes(range(256)) * 10
    mesh = Struct(packed)
    driver.sizes = {0: len(packed), 2: 24}
    for _ in range(2):  # the same object again, as an exchange does
        launch(1, (1,), 32, [mesh, np.int32(5), Struct(packed[:24]), *[None] * 6], **OPTIONS)
        assert driver.structs == [packed, packed[:24]]
        assert driver.calls[-1][2][1][:4] == np.int32(5).tobytes()
    driver.sizes = {}
    launch(1, (1,), 32, [np.int32(7), np.int32(8), np.int32(9), *[None] * 6], **OPTIONS)
    assert [int.from_bytes(value[:4], "little") for value in driver.calls[-1][2][:3]] == [7, 8, 9]
    with pytest.raises(TypeError, match=r"bytes: .* or a Struct"):
        launch(1, (1,), 32, [packed], **OPTIONS)


def test_threads_do_not_share_their_arguments(driver):
    """Each thread launches with its own number in all places, many times at once."""

    def run(number):
        for _ in range(300):
            launch(number, (number,), 32, [np.int32(number)] * 9, **OPTIONS)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(driver.calls) == 1200
    for config, function, read, _ in driver.calls:
        assert config.grid_x == function
        assert all(int.from_bytes(value[:4], "little") == function for value in read)


def test_what_is_no_argument_is_refused_and_an_error_is_named(driver, monkeypatch):
    with pytest.raises(TypeError, match="sized numpy scalar"):
        launch(1, (1,), 32, [1.5], **OPTIONS)
    assert not driver.calls

    class Words:
        @staticmethod
        def cuGetErrorString(code, text):
            text._obj.value = b"invalid configuration argument"

    driver.code = 9
    monkeypatch.setattr(module, "driver", Words)
    with pytest.raises(KernelError, match="some_kernel: driver error 9: invalid configuration argument"):
        launch(1, (1,), 32, [None] * 9, **OPTIONS)


def test_a_thread_that_has_called_nothing_of_cuda_gets_the_context_of_its_device(driver, monkeypatch):
    driver.code = 201
    used = []

    def use_context(device):
        used.append(device)
        driver.code = 0

    monkeypatch.setattr(module, "use_context", use_context)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 3, raising=False)
    launch(1, (1,), 32, [None] * 9, **OPTIONS)
    assert used == [3]
    assert len(driver.calls) == 2
