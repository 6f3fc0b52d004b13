"""What is changed in FlashInfer's headers before they are compiled: (header, text, text in its place), each text there
once.

*The barrier.* At the end of a query tile 256 threads of its FA3 kernel arrive at and then wait on one barrier of 256
(BAR.ARV 1, 256, then BAR.SYNC 1, 256), so four fast warps complete it by themselves and read rows of the result that
slow ones have not written yet. The wait alone is right; without the arrival the machine code is the same but for names
of registers. Seen under compute-sanitizer, which slows warps unevenly: 8 to 12 wrong rows.

*e4m3.* `paged_attention_e4m3.cuh` says what and why; code for bf16 is as it was."""

_FA2 = "flashinfer/attention/prefill.cuh"
_CAST = (
    "        vec_cast<typename KTraits::DTypeQ, typename KTraits::DTypeKV>::cast<8>(\n"
    "            (typename KTraits::DTypeQ*)b_frag, (typename KTraits::DTypeKV*)b_frag_f8);\n"
)
_FIRST_V = (
    "paged_kv.v_data, 0,\n"
    "                                   thr_local_kv_offset, chunk_size, warp_idx, lane_idx);\n"
    "    cp_async::commit_group();\n"
)
_STORE = "#ifdef FLASHINFER_STMATRIX_M8N8X4_ENABLED\n          uint32_t o_smem_offset_w"


def _moved(name: str) -> str:
    return "".join(f"        b_frag_f8[{i}] = {name}(b_frag_f8[{i}]);\n" for i in (0, 1))


FIXES = (
    (
        "flashinfer/attention/hopper/epilogue.cuh",
        "    cutlass::arch::NamedBarrier::arrive(NUM_MMA_THREADS,\n"
        "                                        cutlass::arch::ReservedNamedBarriers::EpilogueBarrier);\n",
        "",
    ),
    (_FA2, _moved("frag_layout_swizzle_16b_to_8b") + _CAST, "        e4m3::widen_k(b_frag, b_frag_f8);\n"),
    (
        _FA2,
        _moved("frag_layout_swizzle_16b_to_8b_trans") + _CAST + "        swap(b_frag[1], b_frag[2]);\n",
        "        e4m3::widen_v(b_frag, b_frag_f8);\n",
    ),
    (
        _FA2,
        _FIRST_V,
        _FIRST_V
        + "    if constexpr (sizeof(typename KTraits::DTypeKV) == 1) {\n"
        + "      cp_async::wait_group<2>();  // q is there\n"
        + "      block.sync();\n"
        + "      e4m3::sort_columns<KTraits>(qo_smem, tid);\n"
        + "      block.sync();\n"
        + "    }\n",
    ),
    (
        _FA2,
        _STORE,
        "          if constexpr (sizeof(typename KTraits::DTypeKV) == 1) {\n"
        "            const uint32_t first_row = (warp_idx_x * KTraits::NUM_MMA_Q + mma_q) * 16;\n"
        "            e4m3::store_o<KTraits>(*o_smem, first_row, mma_d, o_frag_f16);\n"
        "            continue;\n"
        "          }\n" + _STORE,
    ),
)
