# isobath_flags: warnings and sanitizers every target of the project is compiled with.
add_library(isobath_flags INTERFACE)
target_compile_options(isobath_flags INTERFACE -Wall -Wextra -Wshadow=local -Wnon-virtual-dtor -Woverloaded-virtual)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  target_compile_options(isobath_flags INTERFACE -fpch-preprocess)  # ccache cannot cache users of a precompiled header without
endif()
if(ISOBATH_SANITIZE)
  target_compile_options(isobath_flags INTERFACE -fsanitize=${ISOBATH_SANITIZE} -fno-sanitize-recover=all
    -fno-omit-frame-pointer)
  target_link_options(isobath_flags INTERFACE -fsanitize=${ISOBATH_SANITIZE})
endif()
