# Included: makes isobath/core/version.hpp a generated header of module core.
# Run by `cmake -P` at every build: writes that header, touching it only when it changes.
if(CMAKE_SCRIPT_MODE_FILE)
  execute_process(COMMAND git describe --always --dirty --abbrev=12 --exclude=* WORKING_DIRECTORY ${source_dir}
    OUTPUT_VARIABLE revision OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failure)
  if(failure)
    set(revision unknown)
  endif()
  configure_file(${CMAKE_CURRENT_LIST_DIR}/version.hpp.in ${output} @ONLY)
else()
  set(version_header ${PROJECT_BINARY_DIR}/include/isobath/core/version.hpp)
  add_custom_target(isobath_version ALL BYPRODUCTS ${version_header} COMMENT ""
    COMMAND ${CMAKE_COMMAND} -D source_dir=${PROJECT_SOURCE_DIR} -D version=${PROJECT_VERSION}
            -D output=${version_header} -P ${PROJECT_SOURCE_DIR}/cmake/Version.cmake)
  target_sources(isobath_core PUBLIC FILE_SET generated TYPE HEADERS
    BASE_DIRS ${PROJECT_BINARY_DIR}/include FILES ${version_header})
  add_dependencies(isobath_core isobath_version)
endif()
