/* Collectives between processes of one host through a shared mapping. Linux, C11; uses nothing of CPython, called by ctypes.
 *
 * The mapping: a header line, one control line per rank, then two buffers of `slot` bytes per rank. A collective is a series of
 * exchanges, each of one or two steps. A rank announces a step by storing its number in its own control line (release); peers
 * wait for it (acquire), so the data written before is visible on any memory model. Exchanges alternate between the two
 * buffers: to announce an exchange is also to say that the one before has been read, hence a rank may write into its buffer for
 * exchange e once every rank has announced e - 1.
 *
 * Waiting spins briefly, giving way to others now and then, and then sleeps on a futex. A sleeper looks up every
 * few milliseconds for an abort, for a peer that died (its lifeline, a pipe whose only write end the peer held, hangs up) and
 * for the deadline. Every sum is formed in rank order, so that it is bitwise the same on every rank; 16-bit floats are summed
 * in single precision and rounded once.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define EXPORT __attribute__((visibility("default")))
#define LINE 128 /* two cache lines: adjacent-line prefetch makes a single one shared */
#define MAX_RANKS 128
#define REASON 512
#define NAP_NS 2000000L
#define SPINS_PER_YIELD 128

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__)
#define VECTORISED __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define VECTORISED
#endif

enum status { OK = 0, ABORTED = 1, TIMED_OUT = 2, PEER_LOST = 3, MISMATCH = 4, UNSUPPORTED = 5 };
enum dtype { U8, U16, U32, U64, F16, BF16, F32, F64 }; /* integers wrap alike whether signed or not */

struct control { /* one per rank, written by that rank only, except `sleepers` */
    _Atomic uint32_t step;
    _Atomic uint32_t sleepers;
    uint64_t signature[2]; /* of the collective announced, by buffer */
    char pad[LINE - 24];
};

struct header {
    _Atomic uint32_t failure; /* 0, or status | rank << 8, set once */
    _Atomic uint32_t reason_ready;
    char reason[REASON];
    char pad[1024 - 8 - REASON];
};

struct region {
    struct header *header;
    struct control *control;
    uint8_t *slots;
    size_t size, slot;
    int rank, ranks;
    int spins;
    int64_t timeout_ns;
    uint32_t step;     /* last step this rank announced */
    uint32_t opened;   /* step that announced the exchange before */
    uint32_t exchange; /* number of the current one */
    struct pollfd lifelines[MAX_RANKS];
};

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("isb");
#endif
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static long futex(_Atomic uint32_t *word, int operation, uint32_t value, const struct timespec *timeout) {
    return syscall(SYS_futex, word, operation, value, timeout, NULL, 0);
}

static inline int reached(uint32_t step, uint32_t wanted) { return (int32_t)(step - wanted) >= 0; }

static inline uint32_t step_of(struct region *g, int rank) {
    return atomic_load_explicit(&g->control[rank].step, memory_order_acquire);
}

static inline uint8_t *buffer(struct region *g, int rank) {
    return g->slots + ((size_t)rank * 2 + (g->exchange & 1)) * g->slot;
}

/* ---- failing ------------------------------------------------------------------------------------------------------------ */

static void wake_all(struct region *g) {
    for (int r = 0; r < g->ranks; r++) futex(&g->control[r].step, FUTEX_WAKE, INT32_MAX, NULL);
}

/* The first failure of a generation is everybody's. Returns it, which may be another than the one given. */
static int fail(struct region *g, uint32_t failure, const char *reason) {
    uint32_t none = 0;
    if (atomic_compare_exchange_strong(&g->header->failure, &none, failure)) {
        if (reason) strncpy(g->header->reason, reason, REASON - 1);
        atomic_store(&g->header->reason_ready, 1);
        wake_all(g);
        return (int)failure;
    }
    return (int)none;
}

static int failure_of(struct region *g) { return (int)atomic_load_explicit(&g->header->failure, memory_order_acquire); }

/* A dead peer will never announce `step`. Its lifeline also hangs up when it closes in good order, having announced all. */
static int find_dead(struct region *g, uint32_t step, int only) {
    if (poll(g->lifelines, (nfds_t)g->ranks, 0) <= 0) return OK;
    for (int r = 0; r < g->ranks; r++) {
        if (!(g->lifelines[r].revents & (POLLHUP | POLLERR)) || (only >= 0 && r != only)) continue;
        if (!reached(step_of(g, r), step)) return PEER_LOST | r << 8;
    }
    return OK;
}

/* ---- announcing and waiting --------------------------------------------------------------------------------------------- */

static void announce(struct region *g) {
    struct control *mine = &g->control[g->rank];
    atomic_store(&mine->step, ++g->step); /* sequentially consistent with the load: a sleeper is seen, or sees the step */
    if (atomic_load(&mine->sleepers)) futex(&mine->step, FUTEX_WAKE, INT32_MAX, NULL);
}

static int sleep_until(struct region *g, int rank, uint32_t step, int only) {
    struct control *peer = &g->control[rank];
    int64_t deadline = now_ns() + g->timeout_ns;
    int status = OK;
    atomic_fetch_add(&peer->sleepers, 1);
    for (;;) {
        uint32_t seen = atomic_load(&peer->step);
        if (reached(seen, step)) break;
        if ((status = failure_of(g))) break;
        struct timespec nap = {0, NAP_NS};
        if (futex(&peer->step, FUTEX_WAIT, seen, &nap) == 0 || errno == EAGAIN) continue;
        if ((status = find_dead(g, step, only)) == OK && now_ns() > deadline) status = TIMED_OUT | rank << 8;
        if (status != OK) {
            status = fail(g, (uint32_t)status, NULL);
            break;
        }
    }
    atomic_fetch_sub(&peer->sleepers, 1);
    return status;
}

static int wait_for(struct region *g, int rank, uint32_t step, int only) {
    for (int i = 0; i < g->spins; i++) {
        if (reached(step_of(g, rank), step)) return OK;
        relax();
        if (i % SPINS_PER_YIELD == SPINS_PER_YIELD - 1) sched_yield(); /* the peer may be waiting for this very core */
    }
    return reached(step_of(g, rank), step) ? OK : sleep_until(g, rank, step, only);
}

static int wait_all(struct region *g, uint32_t step) {
    for (int r = 0; r < g->ranks; r++) {
        int status = r == g->rank ? OK : wait_for(g, r, step, -1);
        if (status != OK) return status;
    }
    return OK;
}

/* Begin an exchange: when it returns OK, this rank may write into its buffer. */
static int begin(struct region *g, uint64_t signature) {
    int status = failure_of(g);
    if (status != OK) return status;
    status = wait_all(g, g->opened);
    g->exchange++;
    g->control[g->rank].signature[g->exchange & 1] = signature;
    return status;
}

static void open_step(struct region *g) {
    announce(g);
    g->opened = g->step;
}

/* Ranks that are in different collectives would exchange rubbish. Each says which it is in. */
static int agree(struct region *g, int rank) {
    uint64_t theirs = g->control[rank].signature[g->exchange & 1];
    if (theirs == g->control[g->rank].signature[g->exchange & 1]) return OK;
    return fail(g, MISMATCH | (uint32_t)rank << 8, NULL);
}

static int wait_all_agreed(struct region *g) {
    int status = wait_all(g, g->step);
    for (int r = 0; r < g->ranks && status == OK; r++) status = agree(g, r);
    return status;
}

static uint64_t signature(int operation, int detail, uint64_t bytes) {
    return (uint64_t)operation << 56 | (uint64_t)(detail & 0xff) << 48 | (bytes & 0xffffffffffffULL);
}

/* ---- sums --------------------------------------------------------------------------------------------------------------- */

#define BLOCK 2048

/* out may be one of the sources: every element is read before it is written, and no other. */
#define DEFINE_SUM(NAME, T)                                                                       \
    VECTORISED static void NAME(void *out_, const void *const *sources, int ranks, size_t count) { \
        T total[BLOCK];                                                                           \
        for (size_t at = 0; at < count; at += BLOCK) {                                            \
            size_t n = count - at < BLOCK ? count - at : BLOCK;                                   \
            const T *a = (const T *)sources[0] + at, *b = (const T *)sources[1] + at;             \
            for (size_t i = 0; i < n; i++) total[i] = (T)(a[i] + b[i]);                           \
            for (int r = 2; r < ranks; r++) {                                                     \
                const T *c = (const T *)sources[r] + at;                                          \
                for (size_t i = 0; i < n; i++) total[i] = (T)(total[i] + c[i]);                   \
            }                                                                                     \
            memcpy((T *)out_ + at, total, n * sizeof(T));                                         \
        }                                                                                         \
    }

/* 16-bit floats: widened block by block, summed in single precision, rounded once. The conversions are loops over integers, or
 * over floats, never both, which any compiler turns into vector code. */
#define DEFINE_SUM16(NAME, WIDEN, NARROW)                                                         \
    VECTORISED static void NAME(void *out_, const void *const *sources, int ranks, size_t count) { \
        union block total, next;                                                                  \
        for (size_t at = 0; at < count; at += BLOCK) {                                            \
            size_t n = count - at < BLOCK ? count - at : BLOCK;                                   \
            WIDEN(&total, (const uint16_t *)sources[0] + at, n);                                  \
            for (int r = 1; r < ranks; r++) {                                                     \
                WIDEN(&next, (const uint16_t *)sources[r] + at, n);                               \
                for (size_t i = 0; i < n; i++) total.f[i] += next.f[i];                           \
            }                                                                                     \
            NARROW((uint16_t *)out_ + at, &total, n);                                             \
        }                                                                                         \
    }

union block {
    float f[BLOCK];
    uint32_t u[BLOCK];
};

static inline size_t least(size_t a, size_t b) { return a < b ? a : b; }

VECTORISED static void widen_bf16(union block *to, const uint16_t *from, size_t n) {
    for (size_t i = 0; i < n; i++) to->u[i] = (uint32_t)from[i] << 16;
}

/* All ones where a < b, for values below 2^31: selecting by mask, a loop has no branch. Macros, since GCC does not inline a
 * function into one that is compiled for another architecture. */
#define BELOW(a, b) ((uint32_t)((int32_t)((a) - (b)) >> 31))
#define CHOOSE(mask, yes, no) (((yes) & (mask)) | ((no) & ~(mask)))

/* Round to nearest even; a NaN stays one. */
VECTORISED static void narrow_bf16(uint16_t *to, const union block *from, size_t n) {
    union block rounded;
    for (size_t i = 0; i < n; i++) {
        uint32_t x = from->u[i], nan = BELOW(0x7f800000, x & 0x7fffffff);
        rounded.u[i] = CHOOSE(nan, x | 0x400000, x + 0x7fff + (x >> 16 & 1));
    }
    for (size_t i = 0; i < n; i++) to[i] = (uint16_t)(rounded.u[i] >> 16);
}

/* 0x38800000 is 2^-14, the least normal half. Adding it to a subnormal's bits and subtracting it as a float normalises them. */
VECTORISED static void widen_f16(union block *to, const uint16_t *from, size_t n) {
    union block tiny;
    for (size_t i = 0; i < n; i++) tiny.u[i] = ((uint32_t)(from[i] & 0x7fff) << 13) + 0x38800000;
    for (size_t i = 0; i < n; i++) tiny.f[i] -= 0x1p-14f;
    for (size_t i = 0; i < n; i++) {
        uint32_t x = from[i], magnitude = x & 0x7fff, bits = (magnitude << 13) + 0x38000000;
        bits |= BELOW(0x7bff, magnitude) & 0x7f800000;
        to->u[i] = CHOOSE(BELOW(magnitude, 0x400), tiny.u[i], bits) | (x & 0x8000) << 16;
    }
}

/* Round to nearest even. Adding 0.5 lets the float adder round to the grid of subnormal halves. */
VECTORISED static void narrow_f16(uint16_t *to, const union block *from, size_t n) {
    union block tiny;
    for (size_t i = 0; i < n; i++) tiny.u[i] = from->u[i] & 0x7fffffff;
    for (size_t i = 0; i < n; i++) tiny.f[i] += 0.5f;
    for (size_t i = 0; i < n; i++) {
        uint32_t x = from->u[i] & 0x7fffffff, sign = from->u[i] >> 16 & 0x8000;
        uint32_t half = (x - 0x38000000 + 0xfff + (x >> 13 & 1)) >> 13; /* carries into infinity by itself */
        half = CHOOSE(BELOW(x, 0x38800000), tiny.u[i] - 0x3f000000, half);
        half = CHOOSE(BELOW(x, 0x47800000), half, 0x7c00);
        half = CHOOSE(BELOW(0x7f800000, x), 0x7e00, half);
        to[i] = (uint16_t)(sign | half);
    }
}

#if defined(__x86_64__)
/* Processors of the last decade convert half precision themselves. */
__attribute__((target("avx,f16c"))) static void widen_f16c(union block *to, const uint16_t *from, size_t n) {
    for (; n % 8; n--) to->f[n - 1] = _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(from[n - 1])));
    for (size_t i = 0; i < n; i += 8) _mm256_storeu_ps(to->f + i, _mm256_cvtph_ps(_mm_loadu_si128((const void *)(from + i))));
}

__attribute__((target("avx,f16c"))) static void narrow_f16c(uint16_t *to, const union block *from, size_t n) {
    for (; n % 8; n--) to[n - 1] = (uint16_t)_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(from->f[n - 1]), 0));
    for (size_t i = 0; i < n; i += 8) _mm_storeu_si128((void *)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from->f + i), 0));
}
#endif

DEFINE_SUM(sum_u8, uint8_t)
DEFINE_SUM(sum_u16, uint16_t)
DEFINE_SUM(sum_u32, uint32_t)
DEFINE_SUM(sum_u64, uint64_t)
DEFINE_SUM(sum_f32, float)
DEFINE_SUM(sum_f64, double)
DEFINE_SUM16(sum_f16_anywhere, widen_f16, narrow_f16)
DEFINE_SUM16(sum_bf16, widen_bf16, narrow_bf16)

#if defined(__x86_64__)
DEFINE_SUM16(sum_f16_here, widen_f16c, narrow_f16c)
static void sum_f16(void *out, const void *const *sources, int ranks, size_t count) {
    (__builtin_cpu_supports("f16c") ? sum_f16_here : sum_f16_anywhere)(out, sources, ranks, count);
}
#else
#define sum_f16 sum_f16_anywhere
#endif

typedef void (*sum_function)(void *, const void *const *, int, size_t);
static const sum_function SUMS[] = {sum_u8, sum_u16, sum_u32, sum_u64, sum_f16, sum_bf16, sum_f32, sum_f64};
static const size_t WIDTHS[] = {1, 2, 4, 8, 2, 2, 4, 8};

/* ---- collectives: 0, or status | rank << 8 ------------------------------------------------------------------------------ */

enum operation { BARRIER = 1, ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, BROADCAST };

/* Every rank gives all it has and sums everything: one step, the least latency. */
static int all_reduce_once(struct region *g, uint8_t *data, size_t bytes, int dtype, uint64_t mark) {
    const void *sources[MAX_RANKS];
    int status = begin(g, mark);
    if (status != OK) return status;
    memcpy(buffer(g, g->rank), data, bytes);
    open_step(g);
    if ((status = wait_all_agreed(g)) != OK) return status;
    for (int r = 0; r < g->ranks; r++) sources[r] = r == g->rank ? data : buffer(g, r);
    SUMS[dtype](data, sources, g->ranks, bytes / WIDTHS[dtype]);
    return OK;
}

/* Every rank sums one part and hands the sum to all: two steps, the least traffic. */
static int all_reduce_parts(struct region *g, uint8_t *data, size_t bytes, int dtype, uint64_t mark) {
    const void *sources[MAX_RANKS];
    size_t part = ((bytes + (size_t)g->ranks - 1) / (size_t)g->ranks + 63) / 64 * 64;
    int status = begin(g, mark);
    if (status != OK) return status;
    size_t from = least((size_t)g->rank * part, bytes), to = least(from + part, bytes);
    uint8_t *mine = buffer(g, g->rank);
    memcpy(mine, data, from);
    memcpy(mine + to, data + to, bytes - to);
    open_step(g);
    if ((status = wait_all_agreed(g)) != OK) return status;
    for (int r = 0; r < g->ranks; r++) sources[r] = (r == g->rank ? data : buffer(g, r)) + from;
    SUMS[dtype](data + from, sources, g->ranks, (to - from) / WIDTHS[dtype]);
    memcpy(mine + from, data + from, to - from);
    announce(g);
    for (int i = 1; i < g->ranks; i++) { /* each starts with another peer */
        int r = (g->rank + i) % g->ranks;
        size_t start = least((size_t)r * part, bytes), stop = least(start + part, bytes);
        if ((status = wait_for(g, r, g->step, -1)) != OK) return status;
        memcpy(data + start, buffer(g, r) + start, stop - start);
    }
    return OK;
}

EXPORT int tp_all_reduce(struct region *g, uint8_t *data, uint64_t bytes, int dtype, uint64_t once_below) {
    uint64_t mark = signature(ALL_REDUCE, dtype, bytes);
    for (size_t at = 0; at < bytes; at += g->slot) {
        size_t n = least(bytes - at, g->slot);
        int status = n < once_below ? all_reduce_once(g, data + at, n, dtype, mark) : all_reduce_parts(g, data + at, n, dtype, mark);
        if (status != OK) return status;
    }
    return OK;
}

/* A tensor of `rows` rows, each of `width` bytes at `offset` in rows of `stride` bytes, is a stream of rows * width bytes.
 * Copy stream bytes [at, at + n) between the rows and a contiguous piece. */
static void copy_rows(uint8_t *rows, size_t stride, size_t offset, size_t width, uint8_t *piece, size_t at, size_t n, int gather) {
    if (width == stride) {
        gather ? memcpy(piece, rows + at, n) : memcpy(rows + at, piece, n);
        return;
    }
    while (n) {
        size_t column = at % width, run = least(width - column, n);
        uint8_t *place = rows + at / width * stride + offset + column;
        gather ? memcpy(piece, place, run) : memcpy(place, piece, run);
        piece += run, at += run, n -= run;
    }
}

static size_t stride_of(struct region *g, const uint64_t *widths, size_t *offsets) {
    size_t stride = 0;
    for (int r = 0; r < g->ranks; r++) {
        if (offsets) offsets[r] = stride;
        stride += widths[r];
    }
    return stride;
}

static size_t longest(struct region *g, const uint64_t *widths) {
    size_t most = 0;
    for (int r = 0; r < g->ranks; r++) most = widths[r] > most ? widths[r] : most;
    return most;
}

/* in: [rows, widths[rank]] bytes; out: [rows, sum(widths)]. */
EXPORT int tp_all_gather(struct region *g, uint8_t *in, uint8_t *out, uint64_t rows, const uint64_t *widths) {
    size_t offsets[MAX_RANKS], stride = stride_of(g, widths, offsets), total = rows * longest(g, widths);
    uint64_t mark = signature(ALL_GATHER, 0, rows * stride);
    for (size_t at = 0; at < total; at += g->slot) {
        int status = begin(g, mark);
        if (status != OK) return status;
        size_t mine = rows * widths[g->rank], n = at < mine ? least(mine - at, g->slot) : 0;
        memcpy(buffer(g, g->rank), in + (n ? at : 0), n);
        open_step(g);
        copy_rows(out, stride, offsets[g->rank], widths[g->rank], in + (n ? at : 0), at, n, 0);
        for (int i = 1; i < g->ranks; i++) {
            int r = (g->rank + i) % g->ranks;
            size_t theirs = rows * widths[r];
            n = at < theirs ? least(theirs - at, g->slot) : 0;
            if ((status = wait_for(g, r, g->step, -1)) != OK || (status = agree(g, r)) != OK) return status;
            copy_rows(out, stride, offsets[r], widths[r], buffer(g, r), at, n, 0);
        }
    }
    return OK;
}

/* in: [rows, sum(widths)] bytes; out: [rows, widths[rank]]. */
EXPORT int tp_reduce_scatter(struct region *g, uint8_t *in, uint8_t *out, uint64_t rows, const uint64_t *widths, int dtype) {
    const void *sources[MAX_RANKS];
    size_t offsets[MAX_RANKS], stride = stride_of(g, widths, offsets), total = rows * longest(g, widths);
    size_t part = g->slot / (size_t)g->ranks / 64 * 64, mine = rows * widths[g->rank];
    uint64_t mark = signature(REDUCE_SCATTER, dtype, rows * stride);
    for (size_t at = 0; at < total; at += part) {
        int status = begin(g, mark);
        if (status != OK) return status;
        for (int r = 0; r < g->ranks; r++) {
            size_t theirs = rows * widths[r], n = at < theirs ? least(theirs - at, part) : 0;
            copy_rows(in, stride, offsets[r], widths[r], buffer(g, g->rank) + (size_t)r * part, at, n, 1);
        }
        open_step(g);
        if ((status = wait_all_agreed(g)) != OK) return status;
        if (at >= mine) continue;
        for (int r = 0; r < g->ranks; r++) sources[r] = buffer(g, r) + (size_t)g->rank * part;
        SUMS[dtype](out + at, sources, g->ranks, least(mine - at, part) / WIDTHS[dtype]);
    }
    return OK;
}

EXPORT int tp_broadcast(struct region *g, uint8_t *data, uint64_t bytes, int source) {
    uint64_t mark = signature(BROADCAST, source, bytes);
    for (size_t at = 0; at < bytes; at += g->slot) {
        size_t n = least(bytes - at, g->slot);
        int status = begin(g, mark);
        if (status != OK) return status;
        if (g->rank == source) memcpy(buffer(g, source), data + at, n);
        open_step(g);
        if (g->rank == source) continue;
        if ((status = wait_for(g, source, g->step, source)) != OK || (status = agree(g, source)) != OK) return status;
        memcpy(data + at, buffer(g, source), n);
    }
    return OK;
}

EXPORT int tp_barrier(struct region *g) {
    int status = begin(g, signature(BARRIER, 0, 0));
    if (status != OK) return status;
    open_step(g);
    return wait_all_agreed(g);
}

/* ---- life of a region --------------------------------------------------------------------------------------------------- */

EXPORT uint64_t tp_region_bytes(int ranks, uint64_t slot) {
    return sizeof(struct header) + (uint64_t)ranks * sizeof(struct control) + 4096 + (uint64_t)ranks * 2 * slot;
}

/* lifelines[r]: the read end of rank r's pipe, or -1 for none. NULL and errno when it cannot be mapped. */
EXPORT struct region *tp_open(int fd, int rank, int ranks, uint64_t slot, const int *lifelines, double timeout_s, int spins) {
    if (ranks < 2 || ranks > MAX_RANKS || slot % 64) return errno = EINVAL, NULL;
    struct region *g = calloc(1, sizeof *g);
    if (!g) return NULL;
    g->size = tp_region_bytes(ranks, slot);
    uint8_t *base = mmap(NULL, g->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (base == MAP_FAILED) return free(g), NULL;
    g->header = (struct header *)base;
    g->control = (struct control *)(base + sizeof(struct header));
    size_t used = sizeof(struct header) + (size_t)ranks * sizeof(struct control);
    g->slots = base + (used + 4095) / 4096 * 4096;
    g->slot = slot, g->rank = rank, g->ranks = ranks, g->spins = spins;
    g->timeout_ns = (int64_t)(timeout_s * 1e9);
    for (int r = 0; r < ranks; r++) g->lifelines[r] = (struct pollfd){.fd = r == rank ? -1 : lifelines[r]};
    return g;
}

/* From any thread, at any time before tp_close. */
EXPORT void tp_abort(struct region *g, const char *reason) { fail(g, ABORTED | (uint32_t)g->rank << 8, reason); }

EXPORT int tp_failure(struct region *g) { return failure_of(g); }

EXPORT const char *tp_reason(struct region *g) { return atomic_load(&g->header->reason_ready) ? g->header->reason : ""; }

/* No other call may be running. */
EXPORT void tp_close(struct region *g) {
    munmap(g->header, g->size);
    free(g);
}
