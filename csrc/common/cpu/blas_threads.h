// Thread count of the BLAS in products called from one of our own threads.
#pragma once

extern "C" [[gnu::weak]] int MKL_Set_Num_Threads_Local(int threads);

namespace fastmeta {

// Limits the BLAS to one thread, for a scope, on this thread. MKL cuts a product, and so its sums,
// by its number of threads. In a loop with one piece of work it would start threads of its own.
class OneBlasThread {
 public:
  OneBlasThread() : before_(set(1)) {}
  ~OneBlasThread() { set(before_); }
  OneBlasThread(const OneBlasThread&) = delete;
  OneBlasThread& operator=(const OneBlasThread&) = delete;

 private:
  static int set(int threads) {
    return MKL_Set_Num_Threads_Local == nullptr ? 0 : MKL_Set_Num_Threads_Local(threads);
  }

  int before_;
};

}  // namespace fastmeta
