// What the Python checks drive:  io_probe judge < names   one line per safetensors file, "ok" or "reject
// <reason>"
//                                io_probe write <folder>  sample.safetensors and sample.h5, compared in
//                                Python
#include <ATen/ATen.h>

#include <iostream>
#include <isobath/core/error.hpp>
#include <isobath/io/hdf5_file.hpp>
#include <isobath/io/safetensors_reader.hpp>
#include <isobath/io/safetensors_writer.hpp>

namespace {

using namespace isobath;

void judge() {
  for (std::string name; std::getline(std::cin, name);) {
    try {
      io::SafetensorsReader reader(name);
      std::cout << "ok\n";
    } catch (const DataError& error) {
      std::cout << "reject " << error.what() << "\n";
    }
  }
}

void write(const std::filesystem::path& folder) {
  const io::NamedTensors tensors{{"f32", at::arange(6, at::kFloat).reshape({2, 3})},
                                 {"bf16", at::arange(4, at::kBFloat16)},
                                 {"f16", at::arange(3, at::kHalf)},
                                 {"i64", at::arange(2, at::kLong)},
                                 {"i32", at::arange(3, at::kInt)},
                                 {"i8", at::arange(-2, 2, at::kChar)},
                                 {"u8", at::arange(5, at::kByte)},
                                 {"f8", at::arange(4, at::kFloat).to(at::kFloat8_e4m3fn)},
                                 {"e5m2", at::arange(4, at::kFloat).to(at::kFloat8_e5m2)},
                                 {"bool", at::ones({2}, at::kBool)},
                                 {"scalar", at::full({}, 2.5, at::kDouble)},
                                 {"empty", at::empty({0, 3}, at::kFloat)},
                                 {"name \"ü\"", at::zeros({1}, at::kFloat)}};
  io::write_safetensors(folder / "sample.safetensors", tensors, {{"format", "pt"}});

  io::Hdf5Writer writer(folder / "sample.h5");
  for (const auto& [name, tensor] : tensors) {
    const at::ScalarType dtype = tensor.scalar_type();
    if (dtype != at::kHalf && dtype != at::kBool && c10::isFloat8Type(dtype) == false)
      writer.write("g/" + name, tensor);
  }
  writer.attribute("", "integer", int64_t{-5});
  writer.attribute("", "real", 0.5);
  writer.attribute("g", "text", std::string("ü"));
  writer.attribute("g/f32", "texts", std::vector<std::string>{"one", "three"});
  writer.commit();
}

}  // namespace

int main(int argc, char** argv) {
  const std::string verb = argc > 1 ? argv[1] : "";
  if (verb == "judge") {
    judge();
  } else if (verb == "write" && argc == 3) {
    write(argv[2]);
  } else {
    std::cerr << "usage: io_probe judge | write <folder>\n";
    return 2;
  }
  return 0;
}
