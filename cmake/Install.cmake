# `cmake --install`: the libraries with their public headers, the program, and a package for find_package(isobath).
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)
set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/isobath)

get_property(modules GLOBAL PROPERTY ISOBATH_MODULES)
install(TARGETS ${modules} EXPORT isobathTargets
  FILE_SET HEADERS DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
  FILE_SET generated DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
if(TARGET isobath)
  install(TARGETS isobath)
endif()
install(EXPORT isobathTargets NAMESPACE isobath:: DESTINATION ${package_dir})

configure_package_config_file(${PROJECT_SOURCE_DIR}/cmake/isobathConfig.cmake.in
  ${PROJECT_BINARY_DIR}/isobathConfig.cmake INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/isobathConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/isobathConfig.cmake ${PROJECT_BINARY_DIR}/isobathConfigVersion.cmake
  ${PROJECT_SOURCE_DIR}/cmake/FindLibTorch.cmake DESTINATION ${package_dir})
