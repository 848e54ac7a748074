#!/bin/sh
# compute-sanitizer's memcheck over the kernels in a few small GPU tests: `uv run --extra gpu scripts/memcheck.sh`.
# Every buffer is an allocation of its own (the platform's allocator), so that an access beyond one of them is seen, and
# only our kernels are instrumented. Ends with 1 when a test fails or memcheck finds an error.
export XLA_PYTHON_CLIENT_ALLOCATOR=platform XLA_PYTHON_CLIENT_PREALLOCATE=false
exec compute-sanitizer --tool memcheck --error-exitcode 1 --kernel-name kns=mosaic_gpu --print-limit 10 \
    python -m pytest -q -p no:cacheprovider -m gpu \
    -k "${1:-mosaic_gpu and (mixed-loose-128 or top-32-128) and (test_choice or test_any_blocks)}" tests/kernels
