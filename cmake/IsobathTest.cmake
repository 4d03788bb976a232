# isobath_add_test(<name> SOURCES … LINK <modules> RANKS <n>… [TIMEOUT s] [LABELS …])
#
# One executable, one CTest entry per rank count. Every test starts under mpirun, so that one rank is tested the way it
# is launched. The environment allows root and more ranks than cores, as on CI machines.
function(isobath_add_test name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "TIMEOUT" "SOURCES;LINK;RANKS;LABELS")
  if(NOT arg_TIMEOUT)
    set(arg_TIMEOUT 60)
  endif()
  if(NOT arg_RANKS)
    set(arg_RANKS 1)
  endif()
  add_executable(${name} ${arg_SOURCES})
  target_link_libraries(${name} PRIVATE ${arg_LINK} isobath_test_support isobath_flags)
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR}/tests)
  target_compile_definitions(${name} PRIVATE ISOBATH_TEST_DATA="${PROJECT_SOURCE_DIR}/tests/data")
  target_precompile_headers(${name} REUSE_FROM isobath_pch)
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/tests)
  set(environment OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
    OMPI_MCA_hwloc_base_binding_policy=none OMP_NUM_THREADS=1)
  if(ISOBATH_SANITIZE)
    # Open MPI leaks by itself, from plugins that are unloaded before the leak check could name them.
    list(APPEND environment ASAN_OPTIONS=detect_leaks=0)
  endif()
  foreach(n_ranks IN LISTS arg_RANKS)
    add_test(NAME ${name}.np${n_ranks}
      COMMAND ${MPIEXEC_EXECUTABLE} --quiet -n ${n_ranks} $<TARGET_FILE:${name}>)
    set_tests_properties(${name}.np${n_ranks} PROPERTIES PROCESSORS ${n_ranks} TIMEOUT ${arg_TIMEOUT}
      LABELS "np${n_ranks};${arg_LABELS}"
      ENVIRONMENT "${environment}")
  endforeach()
endfunction()
