// A CUDA device without hardware: every call that torch makes of the CUDA runtime and driver, cuBLAS, cuDNN and NCCL
// succeeds; kernels are counted and compute nothing. Copies are real, since device memory is host memory. Functions
// that torch needs and this file lacks are added by stub.py and return 0.
#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>

static const size_t MEMORY = 80ull << 30;    // of each device, in bytes
static const size_t COPIED = 64 << 10;       // larger copies within a device are counted only
static const int DRIVER = 13000, CUDNN = 92600;

static std::mutex mutex;
static std::map<std::string, long> counts;
static std::unordered_map<const void*, std::string> kernel_names;
static std::map<char*, size_t> device_memory, pinned_memory;
static size_t allocated = 0;
static thread_local int current_device = 0;
typedef std::lock_guard<std::mutex> Guard;

static void count(const std::string& what, long times = 1) { Guard guard(mutex); counts[what] += times; }
static int num_devices() { const char* text = getenv("STUB_GPUS"); return text ? atoi(text) : 1; }
static void* new_handle() { return calloc(1, 256); }  // a stream, event, communicator, ...: never looked into by torch

// C linkage, because these symbols stand in for those of NVIDIA's libraries
extern "C" {

// ---- read by stub.py through ctypes: lines of "what <tab> times" since the last call ----
int stub_take_counts(char* out, size_t size) {
  Guard guard(mutex);
  std::string text;
  for (auto& [what, times] : counts) text += what + "\t" + std::to_string(times) + "\n";
  if (text.size() >= size) return -1;
  memcpy(out, text.c_str(), text.size() + 1);
  counts.clear();
  return 0;
}

// ---- devices: an H100, because what torch chooses (attention kernels, tiles of Triton) depends on its properties ----
cudaError_t cudaGetDeviceCount(int* n) { *n = num_devices(); return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { *device = current_device; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { current_device = device; return cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "H100 (stub)");
  p->major = 9;
  p->totalGlobalMem = MEMORY;
  p->multiProcessorCount = 132;
  p->l2CacheSize = 50 << 20;
  p->memoryBusWidth = 5120;
  p->totalConstMem = p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = 232448;
  p->sharedMemPerMultiprocessor = 233472;
  p->warpSize = 32;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->textureAlignment = 512;
  p->concurrentKernels = p->unifiedAddressing = p->managedMemory = 1;
  p->asyncEngineCount = 3;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  static const std::map<int, int> values = {
      {cudaDevAttrComputeCapabilityMajor, 9}, {cudaDevAttrMultiProcessorCount, 132}, {cudaDevAttrWarpSize, 32},
      {cudaDevAttrMaxSharedMemoryPerBlock, 49152}, {cudaDevAttrMaxSharedMemoryPerBlockOptin, 232448},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 233472}, {cudaDevAttrMaxThreadsPerBlock, 1024},
      {cudaDevAttrMaxThreadsPerMultiProcessor, 2048}, {cudaDevAttrMaxGridDimX, 2147483647},
      {cudaDevAttrMaxGridDimY, 65535}, {cudaDevAttrMaxGridDimZ, 65535}, {cudaDevAttrClockRate, 1980000}};
  auto found = values.find(attribute);
  *value = found == values.end() ? 0 : found->second;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* low, int* high) { *low = 0; *high = -5; return cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char* id, int n, int) { strncpy(id, "0000:00:00.0", n); return cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { *can = 0; return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { *version = DRIVER; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { *version = DRIVER; return cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *total = MEMORY;
  *free = MEMORY - allocated;
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) { return "stub"; }
const char* cudaGetErrorName(cudaError_t) { return "stub"; }

// ---- memory: pages that exist once they are written, so that 80 GB fit on any machine; torch's allocator is real ----
cudaError_t cudaMalloc(void** pointer, size_t size) {
  size = (size + 4096) & ~4095ull;  // one page for no bytes too
  if (allocated + size > MEMORY) return cudaErrorMemoryAllocation;
  *pointer = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (*pointer == MAP_FAILED) return cudaErrorMemoryAllocation;
  Guard guard(mutex);
  device_memory[(char*)*pointer] = size;
  allocated += size;
  return cudaSuccess;
}
cudaError_t cudaFree(void* pointer) {
  Guard guard(mutex);
  auto found = device_memory.find((char*)pointer);
  if (found == device_memory.end()) return cudaSuccess;
  munmap(pointer, found->second);
  allocated -= found->second;
  device_memory.erase(found);
  return cudaSuccess;
}
cudaError_t cudaHostRegister(void* pointer, size_t size, unsigned) {
  Guard guard(mutex);
  pinned_memory[(char*)pointer] = size;
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* pointer) {
  Guard guard(mutex);
  pinned_memory.erase((char*)pointer);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** pointer, size_t size, unsigned flags) {
  if (posix_memalign(pointer, 4096, size + 1)) return cudaErrorMemoryAllocation;
  return cudaHostRegister(*pointer, size, flags);
}
cudaError_t cudaFreeHost(void* pointer) {
  cudaHostUnregister(pointer);
  free(pointer);
  return cudaSuccess;
}
static bool is_in(const std::map<char*, size_t>& memory, const void* pointer) {
  Guard guard(mutex);
  auto next = memory.upper_bound((char*)pointer);
  return next != memory.begin() && (char*)pointer < std::prev(next)->first + std::prev(next)->second;
}
static const char* place(const void* pointer) {
  return is_in(device_memory, pointer) ? "device" : is_in(pinned_memory, pointer) ? "pinned" : "pageable";
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* pointer) {
  memset(a, 0, sizeof *a);
  std::string kind = place(pointer);
  a->type = kind == "device" ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
  if (kind == "pageable") a->type = cudaMemoryTypeUnregistered;
  if (kind == "pageable") a->device = -1;
  if (kind != "pageable") a->devicePointer = (void*)pointer;
  if (kind != "device") a->hostPointer = (void*)pointer;
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t) {
  std::string what = std::string("copy ") + place(from) + " to " + place(to);
  count(what);
  count("bytes of " + what, size);
  if (what != "copy device to device" || size <= COPIED) memcpy(to, from, size);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind kind) {
  count("sync memcpy");
  return cudaMemcpyAsync(to, from, size, kind, nullptr);
}
cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) { count("memset"); return cudaSuccess; }
cudaError_t cudaMemset(void*, int, size_t) { count("memset"); return cudaSuccess; }

// ---- streams and events: all work is done at once, and what makes the host wait is counted ----
cudaError_t cudaStreamCreate(cudaStream_t* s) { *s = (cudaStream_t)new_handle(); return cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned) { return cudaStreamCreate(s); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int) { return cudaStreamCreate(s); }
cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { *priority = 0; return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t*, const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t* n) {
  *status = cudaStreamCaptureStatusNone;
  if (id) *id = 0;
  if (n) *n = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { count("sync stream"); return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { count("sync device"); return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { count("sync event"); return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t* e) { *e = (cudaEvent_t)new_handle(); return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) { return cudaEventCreate(e); }
cudaError_t cudaEventDestroy(cudaEvent_t e) { free(e); return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) { *ms = 1; return cudaSuccess; }
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* data) {
  function(data);
  return cudaSuccess;
}
cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t function, void* data, unsigned) {
  function(s, cudaSuccess, data);
  return cudaSuccess;
}

// ---- kernels of torch: the compiler's registration gives their names ----
void** __cudaRegisterFatBinary(void*) { return (void**)new_handle(); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  Guard guard(mutex);
  kernel_names[host] = name;
}
static thread_local struct { dim3 grid, block; size_t shared; void* stream; } configuration;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *(void**)stream = configuration.stream;
  return cudaSuccess;
}
static cudaError_t launch(const void* kernel) {
  Guard guard(mutex);
  counts["kernel " + kernel_names[kernel]]++;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* k, const void* host) { *k = (cudaKernel_t)host; return cudaSuccess; }
cudaError_t __cudaLaunchKernel(cudaKernel_t k, dim3, dim3, void**, size_t, cudaStream_t) { return launch((void*)k); }
cudaError_t cudaLaunchKernel(const void* k, dim3, dim3, void**, size_t, cudaStream_t) { return launch(k); }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void* k, void**) { return launch(k); }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 32;
  a->binaryVersion = a->ptxVersion = 90;
  a->maxDynamicSharedSizeBytes = 232448;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void*, int, size_t) {
  *n = 2;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void* k, int size, size_t shared,
                                                                   unsigned) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(n, k, size, shared);
}
cudaError_t cudaGetSymbolAddress(void** pointer, const void*) { *pointer = new_handle(); return cudaSuccess; }

// ---- driver: torch takes its functions from the runtime, Triton and NVRTC from libcuda.so.1, which is this file ----
static int do_nothing() { return 0; }
int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* is_active) { *flags = 0; *is_active = 1; return 0; }
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  bool is_state = !strcmp(name, "cuDevicePrimaryCtxGetState");
  *function = is_state ? (void*)cuDevicePrimaryCtxGetState : (void*)do_nothing;
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
int cuInit(unsigned) { return 0; }
int cuGetExportTable(const void** table, const void*) { *table = nullptr; return 1; }  // NVRTC does without
int cuDriverGetVersion(int* version) { *version = DRIVER; return 0; }
int cuDeviceGetCount(int* n) { *n = num_devices(); return 0; }
int cuDeviceGet(int* device, int i) { *device = i; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  return cudaDeviceGetAttribute(value, (cudaDeviceAttr)attribute, device);
}
int cuCtxGetCurrent(void** context) { static int handle; *context = &handle; return 0; }
int cuDevicePrimaryCtxRetain(void** context, int) { return cuCtxGetCurrent(context); }
int cuCtxSetCurrent(void*) { return 0; }
int cuCtxGetDevice(int* device) { *device = current_device; return 0; }
int cuCtxGetLimit(size_t* value, int) { *value = 1024; return 0; }
int cuCtxSetLimit(int, size_t) { return 0; }
int cuModuleLoad(void** module, const char*) { *module = new_handle(); return 0; }
int cuModuleLoadData(void** module, const void*) { *module = new_handle(); return 0; }
int cuModuleLoadDataEx(void** module, const void*, unsigned, void*, void*) { *module = new_handle(); return 0; }
int cuModuleUnload(void*) { return 0; }
int cuModuleGetFunction(void** function, void*, const char* name) {
  *function = new_handle();
  Guard guard(mutex);
  kernel_names[*function] = std::string("triton ") + name;
  return 0;
}
int cuFuncGetAttribute(int* value, int attribute, void*) {
  *value = attribute == 0 ? 1024 : attribute == 4 ? 32 : 0;  // threads per block, registers
  return 0;
}
int cuFuncSetAttribute(void*, int, int) { return 0; }
int cuFuncSetCacheConfig(void*, int) { return 0; }
int cuOccupancyMaxActiveClusters(int* n, void*, void*) { *n = 1; return 0; }
int cuLaunchKernelEx(const void*, void* kernel, void**, void**) { return launch(kernel); }
int cuLaunchKernel(void* kernel, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                   void**) {
  return launch(kernel);
}
int cuPointerGetAttribute(void* value, int, unsigned long long pointer) {
  *(unsigned long long*)value = pointer;
  return 0;
}
int cuGetErrorString(int, const char** text) { *text = "stub"; return 0; }

// ---- cuBLAS: products are counted with what they multiply in; enumerations are ints and handles are pointers ----
enum { R_32F = 0, R_16F = 2, R_16BF = 14, COMPUTE_32F = 68, COMPUTE_32F_FAST_TF32 = 77, TF32_MATH = 3 };
static thread_local int math_mode = 0;
static int count_product(int type, bool is_tf32) {
  std::string name = type == R_16BF ? "bf16" : type == R_16F ? "fp16" : type == R_32F ? "fp32" : std::to_string(type);
  count("gemm " + name + (type != R_32F ? "" : is_tf32 ? " tf32" : " ieee"));
  return 0;
}
static bool allows_tf32() { return (math_mode & 15) == TF32_MATH; }
int cublasCreate_v2(void** handle) { *handle = new_handle(); return 0; }
int cublasGetMathMode(void*, int* mode) { *mode = math_mode; return 0; }
int cublasSetMathMode(void*, int mode) { math_mode = mode; return 0; }
int cublasGetPointerMode_v2(void*, int* mode) { *mode = 0; return 0; }
int cublasSgemm_v2() { return count_product(R_32F, allows_tf32()); }
int cublasSgemmStridedBatched() { return count_product(R_32F, allows_tf32()); }
int cublasGemmEx(void*, int, int, int, int, int, const void*, const void*, int type) {
  return count_product(type, allows_tf32());
}
int cublasGemmStridedBatchedEx(void*, int, int, int, int, int, const void*, const void*, int type) {
  return count_product(type, allows_tf32());
}

// ---- cuBLASLt: a description holds its compute type, a layout its data type ----
struct Algorithm { uint64_t data[8]; };
struct HeuristicResult { Algorithm algorithm; size_t workspace; int state; float waves; int reserved[4]; };
static int new_description(void** description, int value) {
  *description = new_handle();
  *(int*)*description = value;
  return 0;
}
static int free_description(void* description) { free(description); return 0; }
size_t cublasLtGetVersion() { return 130100; }
int cublasLtMatmulDescCreate(void** d, int compute_type, int) { return new_description(d, compute_type); }
int cublasLtMatrixLayoutCreate(void** d, int type, uint64_t, uint64_t, int64_t) { return new_description(d, type); }
int cublasLtMatmulPreferenceCreate(void** d) { return new_description(d, 0); }
int cublasLtMatmulDescDestroy(void* d) { return free_description(d); }
int cublasLtMatrixLayoutDestroy(void* d) { return free_description(d); }
int cublasLtMatmulPreferenceDestroy(void* d) { return free_description(d); }
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int n, HeuristicResult* results,
                                   int* found) {
  memset(results, 0, n * sizeof *results);
  *found = n;
  return 0;
}
int cublasLtMatmulAlgoCheck(void*, void*, void*, void*, void*, void*, const void*, HeuristicResult* result) {
  memset(result, 0, sizeof *result);
  return 0;
}
int cublasLtMatmul(void*, void* description, const void*, const void*, void* layout) {
  return count_product(*(int*)layout, *(int*)description == COMPUTE_32F_FAST_TF32);
}

// ---- cuDNN: convolutions of version 7's interface, which torch takes in float32 without that of version 8 ----
struct ConvolutionAlgorithm { int id, status; float time; size_t memory; int determinism, math_type, reserved[3]; };
#define CONVOLUTION(KIND)                                                                                             \
  int cudnnGetConvolution##KIND##Algorithm_v7(void*, void*, void*, void*, void*, int, int* n,                         \
                                              ConvolutionAlgorithm* result) {                                         \
    *result = {1};                                                                                                    \
    *n = 1;                                                                                                           \
    return 0;                                                                                                         \
  }                                                                                                                   \
  int cudnnGetConvolution##KIND##WorkspaceSize(void*, void*, void*, void*, void*, int, size_t* size) {                \
    *size = 0;                                                                                                        \
    return 0;                                                                                                         \
  }                                                                                                                   \
  int cudnnConvolution##KIND() { count("conv " #KIND); return 0; }
CONVOLUTION(Forward)
CONVOLUTION(BackwardData)
CONVOLUTION(BackwardFilter)
size_t cudnnGetVersion() { return CUDNN; }
size_t cudnnGetCudartVersion() { return DRIVER; }
int cudnnGetProperty(int part, int* value) {
  *value = part == 0 ? CUDNN / 10000 : part == 1 ? CUDNN / 100 % 100 : CUDNN % 100;
  return 0;
}
const char* cudnnGetErrorString(int) { return "stub"; }
int cudnnCreate(void** handle) { *handle = new_handle(); return 0; }
int cudnnCreateTensorDescriptor(void** d) { return new_description(d, 0); }
int cudnnCreateFilterDescriptor(void** d) { return new_description(d, 0); }
int cudnnCreateConvolutionDescriptor(void** d) { return new_description(d, 0); }
int cudnnCreateDropoutDescriptor(void** d) { return new_description(d, 0); }
int cudnnCreateActivationDescriptor(void** d) { return new_description(d, 0); }
int cudnnCreatePoolingDescriptor(void** d) { return new_description(d, 0); }

// ---- NCCL: every rank is alone, reductions and broadcasts change nothing; a communicator holds size and rank ----
const char* ncclGetErrorString(int) { return "stub"; }
const char* ncclGetLastError(void*) { return "stub"; }
int ncclGetVersion(int* version) { *version = 23007; return 0; }
int ncclCommInitRankConfig(void** communicator, int size, void*, int rank, void*) {
  *communicator = new_handle();
  ((int*)*communicator)[0] = size;
  ((int*)*communicator)[1] = rank;
  return 0;
}
int ncclCommGetAsyncError(void*, int* error) { *error = 0; return 0; }
int ncclCommCount(void* communicator, int* size) { *size = ((int*)communicator)[0]; return 0; }
int ncclCommUserRank(void* communicator, int* rank) { *rank = ((int*)communicator)[1]; return 0; }
static size_t count_collective(const std::string& name, size_t n, int type) {
  static const int sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};  // bytes of each ncclDataType_t
  count("nccl " + name);
  count("bytes of nccl " + name, n * sizes[type]);
  return n * sizes[type];
}
int ncclAllReduce(const void*, void*, size_t n, int type, int, void*, void*) {
  count_collective("all_reduce", n, type);
  return 0;
}
int ncclBroadcast(const void*, void*, size_t n, int type, int, void*, void*) {
  count_collective("broadcast", n, type);
  return 0;
}
int ncclAllGather(const void* from, void* to, size_t n, int type, void* communicator, void*) {
  size_t size = count_collective("all_gather", n, type);
  for (int rank = 0; rank < ((int*)communicator)[0]; rank++) memmove((char*)to + rank * size, from, size);
  return 0;
}
}
