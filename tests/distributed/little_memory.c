/* An allocator that gives each process so many megabytes in large blocks, which tensors are, and no more.
 *
 * To be preloaded. LITTLE_MEMORY: megabytes by rank, separated by commas, 0 for no limit. The kernel's own limit would
 * fail small blocks too, and there are libraries that don't survive that.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <malloc.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { LARGE = 1 << 18, MOST = 1 << 14 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static void *blocks[MOST];
static size_t count, held;

static size_t limit(void) {
  const char *text = getenv("LITTLE_MEMORY"), *rank = getenv("RANK");
  for (int skip = rank ? atoi(rank) : 0; text && skip > 0; skip--)
    if ((text = strchr(text, ','))) text++;
  return text ? (size_t)atoi(text) << 20 : 0;
}

int posix_memalign(void **out, size_t alignment, size_t size) {
  static int (*real)(void **, size_t, size_t);
  if (!real) real = dlsym(RTLD_NEXT, "posix_memalign");
  if (size < LARGE) return real(out, alignment, size);
  const size_t most = limit();
  pthread_mutex_lock(&lock);
  int code = (most && held + size > most) || count == MOST ? ENOMEM : real(out, alignment, size);
  if (code == 0) {
    blocks[count++] = *out;
    held += malloc_usable_size(*out);
  }
  pthread_mutex_unlock(&lock);
  return code;
}

void free(void *block) {
  static void (*real)(void *);
  if (!real) real = dlsym(RTLD_NEXT, "free");
  const size_t size = block ? malloc_usable_size(block) : 0;
  if (size >= LARGE) {
    pthread_mutex_lock(&lock);
    for (size_t i = count; i-- > 0;)
      if (blocks[i] == block) {
        blocks[i] = blocks[--count];
        held -= size;
        break;
      }
    pthread_mutex_unlock(&lock);
  }
  real(block);
}
