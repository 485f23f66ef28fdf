// The CUDA backend's public functions: one per stage, on a stream of the caller's device. They launch and return: no
// synchronisation, no allocation, no host read of device data, so that every one can be captured in a CUDA graph.
#pragma once

#include <cuda_runtime_api.h>

#include "dhsa.h"

namespace dhsa::cuda {

// Bytes of device memory that the stage needs beside its tensors, 256-byte aligned; a function of shapes alone.
int64_t workspace_bytes(const BoundaryScores&);
int64_t workspace_bytes(const BoundaryLogits&);
int64_t workspace_bytes(const SelectBoundaries&);
int64_t workspace_bytes(const ChunkPool&);
int64_t workspace_bytes(const QueryPool&);
int64_t workspace_bytes(const ChunkScores&);
int64_t workspace_bytes(const TokenScores&);
int64_t workspace_bytes(const SelectKeys&);
int64_t workspace_bytes(const ChunkMass&);
int64_t workspace_bytes(const RefineKeys&);
int64_t workspace_bytes(const SparseAttention&);
int64_t workspace_bytes(const SparsePrefill&);
int64_t workspace_bytes(const SparseDecode&);

cudaError_t run(const BoundaryScores&, void* workspace, cudaStream_t);
cudaError_t run(const BoundaryLogits&, void* workspace, cudaStream_t);
cudaError_t run(const SelectBoundaries&, void* workspace, cudaStream_t);
cudaError_t run(const ChunkPool&, void* workspace, cudaStream_t);
cudaError_t run(const QueryPool&, void* workspace, cudaStream_t);
cudaError_t run(const ChunkScores&, void* workspace, cudaStream_t);
cudaError_t run(const TokenScores&, void* workspace, cudaStream_t);
cudaError_t run(const SelectKeys&, void* workspace, cudaStream_t);
cudaError_t run(const ChunkMass&, void* workspace, cudaStream_t);
cudaError_t run(const RefineKeys&, void* workspace, cudaStream_t);
cudaError_t run(const SparseAttention&, void* workspace, cudaStream_t);
cudaError_t run(const SparsePrefill&, void* workspace, cudaStream_t);
cudaError_t run(const SparseDecode&, void* workspace, cudaStream_t);

// Architectures compiled in, as "80,90a"; and whether a GPU of this compute capability can run one of them.
const char* archs_compiled();
bool device_supported(int compute_major, int compute_minor);

// The attention kernels that run on such a GPU: "sm90" (wgmma) on a 9.0 where the build holds 90a, else "sm80"
// (mma.sync). DHSA_FORCE_CUDA_KERNEL=sm80|sm90 picks one; null: it names one that cannot run there.
const char* attention_kernel(int compute_major, int compute_minor);
cudaError_t choose_kernels(bool* sm90);  // the same for the current device

}  // namespace dhsa::cuda
