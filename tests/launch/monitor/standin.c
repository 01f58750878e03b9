/* Stands in for NVIDIA's libnvidia-ml.so.1 in tests: GPUs made of a text file that may change between two calls.

   The file is named by STANDIN_NVML. Its lines:
       gpus N                       how many GPUs there are (at most 64)
       mig G N                      GPU G is cut into N instances
       closed G                     GPU G is another job's
       fail CALL CODE               CALL answers CODE; `*` is every call
       fail CALL@G CODE             only for GPU G
       fail CALL@G/N CODE           only for instance N of GPU G
       set NAME VALUE / set NAME@G VALUE
       process G PID BYTES          a process on GPU G
   layout.h is made from the real nvidia-ml-py: its codes as macros, and assertions that these structs are its own. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

typedef struct { unsigned gpu, memory; } nvmlUtilization_t;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } nvmlMemory_v2_t;
typedef union { double dVal; unsigned uiVal; unsigned long ulVal; unsigned long long ullVal; long long sllVal; } value_t;
typedef struct {
    unsigned fieldId, scopeId;
    long long timestamp, latencyUsec;
    unsigned valueType;
    int nvmlReturn;
    value_t value;
} nvmlFieldValue_t;
typedef struct {
    unsigned pid;
    unsigned long long usedGpuMemory;
    unsigned gpuInstanceId, computeInstanceId;
} nvmlProcessInfo_v3_t;
typedef struct { const char *shortName, *longName, *unit; } metricInfo_t;
typedef struct { unsigned metricId; int nvmlReturn; double value; metricInfo_t metricInfo; } nvmlGpmMetric_t;
typedef struct { double taken_s; } sample_t;
typedef struct { unsigned version, isSupportedDevice; } nvmlGpmSupport_t;

#include "layout.h"

typedef struct {
    unsigned version, numMetrics;
    sample_t *sample1, *sample2;
    nvmlGpmMetric_t metrics[NVML_GPM_METRIC_MAX];
} nvmlGpmMetricsGet_t;
LAYOUT_OF_METRICS_GET

enum { GPUS = 64, INSTANCES = 7, LINES = 512 };
typedef struct { int gpu, instance; } device_t; /* instance -1: the whole GPU */
static device_t whole[GPUS], parts[GPUS][INSTANCES];

typedef struct { char verb[16], name[80]; int gpu, instance; double value, more; } line_t;
static line_t lines[LINES];
static int line_count, started;
static struct timespec read_at;

static void read_lines(void) {
    const char *path = getenv("STANDIN_NVML");
    struct stat now;
    if (!path || stat(path, &now) || !memcmp(&now.st_mtim, &read_at, sizeof read_at)) return;
    FILE *file = fopen(path, "r");
    char text[256];
    read_at = now.st_mtim;
    line_count = 0;
    while (file && fgets(text, sizeof text, file) && line_count < LINES) {
        line_t *l = &lines[line_count];
        memset(l, 0, sizeof *l);
        l->gpu = l->instance = -1;
        if (sscanf(text, "%15s %79s %lf %lf", l->verb, l->name, &l->value, &l->more) < 2) continue;
        char *at = strchr(l->name, '@');
        if (at) sscanf(at, "@%d/%d", &l->gpu, &l->instance), *at = 0;
        line_count++;
    }
    if (file) fclose(file);
}

static int answer(const char *call, int gpu, int instance) {
    read_lines();
    if (!started && strcmp(call, "nvmlInitWithFlags")) return NVML_ERROR_UNINITIALIZED;
    for (int i = 0; i < line_count; i++)
        if (!strcmp(lines[i].verb, "fail") && (!strcmp(lines[i].name, call) || !strcmp(lines[i].name, "*"))
            && (lines[i].gpu < 0 || lines[i].gpu == gpu) && (lines[i].instance < 0 || lines[i].instance == instance))
            return (int)lines[i].value;
    return NVML_SUCCESS;
}

static double get(const char *name, int gpu, double otherwise) {
    for (int i = line_count - 1; i >= 0; i--)
        if (!strcmp(lines[i].verb, "set") && !strcmp(lines[i].name, name) && (lines[i].gpu < 0 || lines[i].gpu == gpu))
            return lines[i].value;
    return otherwise;
}

static int count_of(const char *verb, int gpu) { /* `gpus N`, `mig G N`, `closed G` */
    for (int i = 0; i < line_count; i++)
        if (!strcmp(lines[i].verb, verb) && (gpu < 0 || atoi(lines[i].name) == gpu))
            return gpu < 0 ? atoi(lines[i].name) : !strcmp(verb, "closed") ? 1 : (int)lines[i].value;
    return 0;
}

static double now_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + now.tv_nsec * 1e-9;
}

#define CALL_OF(name, gpu, instance) do { int code = answer(name, gpu, instance); if (code) return code; } while (0)
#define CALL(name, gpu) CALL_OF(name, gpu, -1)
#define ASK(name) CALL_OF(name, device->gpu, device->instance)

int nvmlInitWithFlags(unsigned flags) { (void)flags; CALL("nvmlInitWithFlags", -1); started = 1; return 0; }
int nvmlShutdown(void) { CALL("nvmlShutdown", -1); started = 0; return 0; }
const char *nvmlErrorString(int code) { static char text[32]; sprintf(text, "stand-in code %d", code); return text; }

int nvmlSystemGetDriverVersion(char *version, unsigned length) {
    CALL("nvmlSystemGetDriverVersion", -1);
    snprintf(version, length, "550.00");
    return 0;
}
int nvmlDeviceGetCount_v2(unsigned *count) { CALL("nvmlDeviceGetCount_v2", -1); *count = count_of("gpus", -1); return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, device_t **device) {
    CALL("nvmlDeviceGetHandleByIndex_v2", (int)index);
    if (count_of("closed", index)) return NVML_ERROR_NO_PERMISSION;
    whole[index] = (device_t){(int)index, -1};
    *device = &whole[index];
    return 0;
}
int nvmlDeviceGetUUID(device_t *device, char *uuid, unsigned length) {
    ASK("nvmlDeviceGetUUID");
    if (device->instance < 0) snprintf(uuid, length, "GPU-%08x-aaaa-bbbb-cccc-%012x", 0xa0 + device->gpu, device->gpu);
    else snprintf(uuid, length, "MIG-%08x-aaaa-bbbb-cccc-%012x", 0xa0 + device->gpu, device->instance);
    return 0;
}
int nvmlDeviceGetName(device_t *device, char *name, unsigned length) {
    ASK("nvmlDeviceGetName");
    snprintf(name, length, device->instance < 0 ? "Stand-in H100" : "Stand-in H100 MIG 1g.10gb");
    return 0;
}
int nvmlDeviceGetMigMode(device_t *device, unsigned *current, unsigned *pending) {
    ASK("nvmlDeviceGetMigMode");
    *current = *pending = count_of("mig", device->gpu) > 0;
    return 0;
}
int nvmlDeviceGetMaxMigDeviceCount(device_t *device, unsigned *count) {
    ASK("nvmlDeviceGetMaxMigDeviceCount");
    *count = INSTANCES;
    return 0;
}
int nvmlDeviceGetMigDeviceHandleByIndex(device_t *device, unsigned index, device_t **mig) {
    CALL_OF("nvmlDeviceGetMigDeviceHandleByIndex", device->gpu, (int)index);
    if ((int)index >= count_of("mig", device->gpu)) return NVML_ERROR_NOT_FOUND;
    parts[device->gpu][index] = (device_t){device->gpu, (int)index};
    *mig = &parts[device->gpu][index];
    return 0;
}
int nvmlDeviceGetGpuInstanceId(device_t *device, unsigned *id) {
    ASK("nvmlDeviceGetGpuInstanceId");
    *id = device->instance + 7;
    return 0;
}
int nvmlDeviceGetComputeInstanceId(device_t *device, unsigned *id) {
    ASK("nvmlDeviceGetComputeInstanceId");
    *id = 0;
    return 0;
}

int nvmlDeviceGetUtilizationRates(device_t *device, nvmlUtilization_t *rates) {
    ASK("nvmlDeviceGetUtilizationRates");
    if (count_of("mig", device->gpu)) return NVML_ERROR_NOT_SUPPORTED;
    rates->gpu = get("gpu", device->gpu, 90 + device->gpu);
    rates->memory = get("memory_bus", device->gpu, 40);
    return 0;
}
int nvmlDeviceGetMemoryInfo_v2(device_t *device, nvmlMemory_v2_t *memory) {
    ASK("nvmlDeviceGetMemoryInfo_v2");
    if (memory->version != nvmlMemory_v2) return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    memory->reserved = 512ull << 20;
    memory->total = device->instance < 0 ? 80ull << 30 : 10ull << 30;
    memory->used = get("memory", device->gpu, (double)((unsigned long long)(device->gpu + 1) << 30));
    memory->free = memory->total - memory->used - memory->reserved;
    return 0;
}
#define ONE_NUMBER(call, type, otherwise)                  \
    int call(device_t *device, type *value) {              \
        ASK(#call);                                        \
        *value = (type)get(#call, device->gpu, otherwise); \
        return 0;                                          \
    }
ONE_NUMBER(nvmlDeviceGetPowerUsage, unsigned, 300500 + 1000 * device->gpu)
ONE_NUMBER(nvmlDeviceGetEnforcedPowerLimit, unsigned, 700000)
ONE_NUMBER(nvmlDeviceGetCurrentClocksThrottleReasons, unsigned long long, 0)
ONE_NUMBER(nvmlDeviceGetCurrPcieLinkGeneration, unsigned, 5)
ONE_NUMBER(nvmlDeviceGetCurrPcieLinkWidth, unsigned, 16)
ONE_NUMBER(nvmlDeviceGetMaxPcieLinkWidth, unsigned, 16)

int nvmlDeviceGetTemperature(device_t *device, unsigned sensor, unsigned *celsius) {
    ASK("nvmlDeviceGetTemperature");
    if (sensor != NVML_TEMPERATURE_GPU) return NVML_ERROR_INVALID_ARGUMENT;
    *celsius = get("temperature", device->gpu, 55);
    return 0;
}
int nvmlDeviceGetClockInfo(device_t *device, unsigned kind, unsigned *mhz) {
    ASK("nvmlDeviceGetClockInfo");
    *mhz = kind == NVML_CLOCK_SM ? get("sm_clock", device->gpu, 1755) : get("memory_clock", device->gpu, 2619);
    return 0;
}
int nvmlDeviceGetMaxClockInfo(device_t *device, unsigned kind, unsigned *mhz) {
    ASK("nvmlDeviceGetMaxClockInfo");
    *mhz = kind == NVML_CLOCK_SM ? 1980 : 2619;
    return 0;
}
int nvmlDeviceGetTotalEccErrors(device_t *device, unsigned kind, unsigned counter, unsigned long long *count) {
    ASK("nvmlDeviceGetTotalEccErrors");
    if (counter != NVML_VOLATILE_ECC) return NVML_ERROR_INVALID_ARGUMENT;
    *count = get(kind == NVML_MEMORY_ERROR_TYPE_CORRECTED ? "ecc_corrected" : "ecc_uncorrected", device->gpu, 0);
    return 0;
}
int nvmlDeviceGetRetiredPages(device_t *device, unsigned cause, unsigned *count, unsigned long long *addresses) {
    ASK("nvmlDeviceGetRetiredPages");
    unsigned pages = cause == 0 ? get("retired_pages", device->gpu, 0) : 0, room = *count;
    *count = pages;
    if (!addresses || room < pages) return pages ? NVML_ERROR_INSUFFICIENT_SIZE : 0;
    for (unsigned i = 0; i < pages; i++) addresses[i] = 4096ull * i;
    return 0;
}
int nvmlDeviceGetRemappedRows(device_t *device, unsigned *corrected, unsigned *uncorrected, unsigned *pending, unsigned *failed) {
    ASK("nvmlDeviceGetRemappedRows");
    *corrected = get("remapped", device->gpu, 0);
    *uncorrected = *pending = 0;
    *failed = get("remap_failed", device->gpu, 0);
    return 0;
}
int nvmlDeviceGetComputeRunningProcesses_v3(device_t *device, unsigned *count, nvmlProcessInfo_v3_t *found) {
    ASK("nvmlDeviceGetComputeRunningProcesses_v3");
    unsigned room = *count, n = 0;
    for (int i = 0; i < line_count; i++)
        if (!strcmp(lines[i].verb, "process") && atoi(lines[i].name) == device->gpu) {
            if (found && n < room)
                found[n] = (nvmlProcessInfo_v3_t){(unsigned)lines[i].value, (unsigned long long)lines[i].more, ~0u, ~0u};
            n++;
        }
    *count = n;
    return n && (!found || room < n) ? NVML_ERROR_INSUFFICIENT_SIZE : 0;
}
int nvmlDeviceGetFieldValues(device_t *device, int count, nvmlFieldValue_t *values) {
    ASK("nvmlDeviceGetFieldValues");
    for (int i = 0; i < count; i++) {
        unsigned id = values[i].fieldId;
        char name[16];
        snprintf(name, sizeof name, "field_%u", id);
        int nvlink = id == NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX || id == NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX;
        values[i].nvmlReturn = get("fields_code", device->gpu, nvlink && values[i].scopeId != ~0u ? NVML_ERROR_INVALID_ARGUMENT : 0);
        values[i].valueType = NVML_VALUE_TYPE_UNSIGNED_LONG_LONG;
        values[i].value.ullVal = get(name, device->gpu, now_s() * 1024 * (nvlink ? 100 : 1024 * 10));
    }
    return 0;
}

int nvmlGpmQueryDeviceSupport(device_t *device, nvmlGpmSupport_t *support) {
    ASK("nvmlGpmQueryDeviceSupport");
    if (support->version != NVML_GPM_SUPPORT_VERSION) return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    support->isSupportedDevice = get("gpm", device->gpu, 1);
    return 0;
}
int nvmlGpmSampleAlloc(sample_t **sample) { CALL("nvmlGpmSampleAlloc", -1); *sample = calloc(1, sizeof **sample); return 0; }
int nvmlGpmSampleGet(device_t *device, sample_t *sample) {
    ASK("nvmlGpmSampleGet");
    if (count_of("mig", device->gpu)) return NVML_ERROR_NOT_SUPPORTED; /* of an instance by nvmlGpmMigSampleGet */
    sample->taken_s = now_s();
    return 0;
}
int nvmlGpmMigSampleGet(device_t *device, unsigned instance, sample_t *sample) {
    ASK("nvmlGpmMigSampleGet");
    if (instance < 7) return NVML_ERROR_INVALID_ARGUMENT;
    sample->taken_s = now_s();
    return 0;
}
int nvmlGpmMetricsGet(nvmlGpmMetricsGet_t *request) {
    CALL("nvmlGpmMetricsGet", -1);
    if (request->version != NVML_GPM_METRICS_GET_VERSION) return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    if (request->sample2->taken_s <= request->sample1->taken_s) return NVML_ERROR_INVALID_ARGUMENT; /* older one first */
    for (unsigned i = 0; i < request->numMetrics; i++) {
        char name[16];
        snprintf(name, sizeof name, "gpm_%u", request->metrics[i].metricId);
        double value = get(name, -1, 10.25 + request->metrics[i].metricId);
        request->metrics[i].nvmlReturn = value < 0 ? NVML_ERROR_NOT_SUPPORTED : 0;
        request->metrics[i].value = value;
    }
    return 0;
}
