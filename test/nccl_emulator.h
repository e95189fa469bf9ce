/* nccl_emulator.h - the NCCL calls that slam.h makes, by MPI, on the emulator's memory

   Work in a stream other than the first one waits there until somebody waits for that stream: numbers that are read too early are
   the old ones. Sums are added in rank order. */
#ifndef NCCL_EMULATOR_H
#define NCCL_EMULATOR_H
#define OMPI_SKIP_MPICXX
#define MPICH_SKIP_MPICXX
#include <mpi.h>
#define SLAM_NCCL

typedef enum { ncclSuccess, ncclInvalidUsage, ncclRemoteError } ncclResult_t;
typedef enum { ncclChar, ncclFloat } ncclDataType_t;
enum { ncclSum };
typedef struct ncclUniqueId {
    char mark[128];
} ncclUniqueId;
typedef struct emulator_nccl {
    int rank, n;
} * ncclComm_t;

/* Of a rank given by an environment variable: EMULATOR_NCCL_FAILS does not get through ncclCommInitRank, in which the others wait;
   EMULATOR_NCCL_BREAKS loses its network before its first reduction: nothing in its stream ever ends. */
static inline int emulator_is_rank(const char *variable, int rank) {
    return getenv(variable) && atoi(getenv(variable)) == rank;
}

static inline const char *ncclGetErrorString(ncclResult_t r) {
    return r == ncclRemoteError ? "remote error" : "invalid usage";
}
static inline ncclResult_t ncclGetUniqueId(ncclUniqueId *id) { return strcpy(id->mark, "emulated"), ncclSuccess; }
static inline ncclResult_t ncclCommInitRank(ncclComm_t *comm, int n, ncclUniqueId id, int rank) {
    *comm = new emulator_nccl{rank, n};
    if (emulator_is_rank("EMULATOR_NCCL_FAILS", rank)) return ncclInvalidUsage;
    if (getenv("EMULATOR_NCCL_FAILS")) MPI_Barrier(MPI_COMM_WORLD);
    return strcmp(id.mark, "emulated") ? ncclInvalidUsage : ncclSuccess; // every rank has rank 0's
}
static inline ncclResult_t ncclCommDestroy(ncclComm_t comm) { return delete comm, ncclSuccess; }
static inline ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t *state) {
    return *state = emulator_device.stuck ? ncclRemoteError : ncclSuccess, ncclSuccess;
}
static inline ncclResult_t ncclCommAbort(ncclComm_t comm) { return emulator_device.stuck = 0, ncclCommDestroy(comm); }

/* Numbers first .. first + count - 1 of the sum over ranks of in (n), into out. */
template <typename T>
static ncclResult_t emulator_add(int valid, ncclComm_t comm, cudaStream_t stream, const void *in, void *out, size_t n,
                                 size_t first, size_t count) {
    if (!valid) return ncclInvalidUsage;
    if (emulator_is_rank("EMULATOR_NCCL_BREAKS", comm->rank)) emulator_device.stuck = 1;
    emulator_ask_later(stream, [=] {
        std::vector<T> all((size_t)comm->n * n);
        MPI_Allgather(in, (int)(n * sizeof(T)), MPI_BYTE, all.data(), (int)(n * sizeof(T)), MPI_BYTE, MPI_COMM_WORLD);
        for (size_t i = 0; i < count; i++) {
            T sum = all[first + i];
            for (int k = 1; k < comm->n; k++) sum += all[(size_t)k * n + first + i];
            ((T *)out)[i] = sum;
        }
    });
    return ncclSuccess;
}
static inline ncclResult_t ncclReduceScatter(const void *in, void *out, size_t n, ncclDataType_t type, int,
                                             ncclComm_t comm, cudaStream_t stream) {
    return emulator_add<float>(type == ncclFloat, comm, stream, in, out, n * comm->n, n * comm->rank, n);
}
static inline ncclResult_t ncclReduce(const void *in, void *out, size_t n, ncclDataType_t type, int, int root,
                                      ncclComm_t comm, cudaStream_t stream) {
    return emulator_add<float>(type == ncclFloat, comm, stream, in, out, n, 0, comm->rank == root ? n : 0);
}
static inline ncclResult_t ncclAllGather(const void *in, void *out, size_t n, ncclDataType_t type, ncclComm_t,
                                         cudaStream_t stream) {
    if (type != ncclChar) return ncclInvalidUsage;
    emulator_ask_later(stream, [=] {
        std::vector<char> own((const char *)in, (const char *)in + n); // it may be in `out`
        MPI_Allgather(own.data(), (int)n, MPI_BYTE, out, (int)n, MPI_BYTE, MPI_COMM_WORLD);
    });
    return ncclSuccess;
}
static inline ncclResult_t ncclBroadcast(const void *in, void *out, size_t n, ncclDataType_t type, int root,
                                         ncclComm_t comm, cudaStream_t stream) {
    if (type != ncclChar) return ncclInvalidUsage;
    emulator_ask_later(stream, [=] {
        if (comm->rank == root && in != out) memmove(out, in, n);
        MPI_Bcast(out, (int)n, MPI_BYTE, root, MPI_COMM_WORLD);
    });
    return ncclSuccess;
}
#endif
