// What a CPU build of torch lacks for autograd over fake CUDA tensors: a device that has one stream and does nothing.

#include <new>

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

struct Hooks final : at::CUDAHooksInterface {
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(at::DeviceIndex) const override { return true; }
};
static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface), "one takes the other's place");

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device getDevice() const override { return {type(), 0}; }
  c10::Device exchangeDevice(c10::Device) const override { return getDevice(); }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, getDevice()); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return getStream(getDevice()); }
};

}  // namespace

extern "C" void stand_in(bool on) {
  static const Guard guard;
  constexpr auto cuda = static_cast<size_t>(c10::DeviceType::CUDA);
  c10::impl::device_guard_impl_registry[cuda].store(on ? &guard : nullptr);
  void* hooks = const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks());
  on ? static_cast<at::CUDAHooksInterface*>(new (hooks) Hooks()) : new (hooks) at::CUDAHooksInterface();
}
