// How many threads the BLAS takes for products that are called from a thread of ours.
#pragma once

extern "C" [[gnu::weak]] int MKL_Set_Num_Threads_Local(int threads);

namespace fastmeta {

// One, for a scope, on this thread. MKL cuts a product by its number of threads, and the sums with
// it; and where a loop has one piece of work it would start threads of its own.
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
