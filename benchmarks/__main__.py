"""`python -m benchmarks`: everything this folder measures, one after the other."""

from benchmarks import meta_memory, prototype_loss

if __name__ == "__main__":
    prototype_loss.main()
    print()
    meta_memory.main()
