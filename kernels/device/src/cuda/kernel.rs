//! Kernels by name, from modules compiled ahead of time.
//!
//! Every function of every module is listed when the registry is made, so an unknown name is an
//! error and not a late surprise. Invariant: a kernel's module is loaded as long as the registry.

use super::driver::check;
use super::{Context, CudaError};
use cudarc::driver::sys::{self, CUfunction, CUfunction_attribute as Attribute, CUmodule};
use std::collections::BTreeMap;
use std::ffi::{CStr, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A compiled module.
#[derive(Clone, Copy, Debug)]
pub struct Cubin {
    /// Which, for messages.
    pub name: &'static str,
    /// The ELF image.
    pub image: &'static [u8],
}

/// A function on the device.
#[derive(Clone, Debug)]
pub struct Kernel {
    pub(super) name: Arc<str>,
    pub(super) raw: CUfunction,
    /// Bytes of its one parameter block.
    pub(super) parameters: usize,
    /// Shared by clones.
    launches: Arc<AtomicU64>,
}

// SAFETY: function handles are constant and may be used from any thread.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

impl Kernel {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How often it was enqueued or captured since it was loaded; a graph's launches count once, when
    /// they are captured. Tells which kernels a stretch of work resolved to.
    #[must_use]
    pub fn launches(&self) -> u64 {
        self.launches.load(Ordering::Relaxed)
    }

    /// Counts a launch.
    pub(super) fn count(&self) {
        self.launches.fetch_add(1, Ordering::Relaxed);
    }

    fn attribute(&self, which: Attribute) -> Result<u32, CudaError> {
        let mut value = 0;
        // SAFETY: the pointer is to a live integer, the function belongs to a loaded module.
        let got = unsafe { sys::cuFuncGetAttribute(&raw mut value, which, self.raw) };
        check("cuFuncGetAttribute", got)?;
        Ok(u32::try_from(value).unwrap_or(0))
    }

    /// Bytes per thread that registers did not suffice for.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn local_bytes(&self) -> Result<u32, CudaError> {
        self.attribute(Attribute::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)
    }

    /// Registers per thread.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn registers(&self) -> Result<u32, CudaError> {
        self.attribute(Attribute::CU_FUNC_ATTRIBUTE_NUM_REGS)
    }
}

/// All kernels of a program on one device.
#[derive(Debug)]
pub struct Kernels {
    by_name: BTreeMap<Arc<str>, Kernel>,
    modules: Vec<CUmodule>,
    context: Context,
}

// SAFETY: module handles are only kept to be unloaded.
unsafe impl Send for Kernels {}
// SAFETY: as above.
unsafe impl Sync for Kernels {}

impl Kernels {
    /// Loads modules; `missing` says why there are none where there are none.
    ///
    /// # Errors
    /// Without modules, or when one does not fit the device.
    pub fn load(
        context: &Context,
        cubins: &[Cubin],
        missing: &'static str,
    ) -> Result<Self, CudaError> {
        if cubins.is_empty() {
            return Err(CudaError::NoKernels { reason: missing });
        }
        let mut kernels =
            Self { by_name: BTreeMap::new(), modules: Vec::new(), context: context.clone() };
        for cubin in cubins {
            let mut module = std::ptr::null_mut();
            // SAFETY: the image is a complete ELF that the compiler wrote; the driver copies it.
            let loaded = unsafe {
                sys::cuModuleLoadData(&raw mut module, cubin.image.as_ptr().cast::<c_void>())
            };
            check("cuModuleLoadData", loaded)?;
            kernels.modules.push(module);
            kernels.list(module)?;
        }
        Ok(kernels)
    }

    /// Lists the functions of a module.
    fn list(&mut self, module: CUmodule) -> Result<(), CudaError> {
        let mut count = 0;
        // SAFETY: the module is loaded; the pointer is to a live integer.
        let got = unsafe { sys::cuModuleGetFunctionCount(&raw mut count, module) };
        check("cuModuleGetFunctionCount", got)?;
        let mut functions: Vec<CUfunction> = vec![std::ptr::null_mut(); count as usize];
        // SAFETY: the list has room for `count` handles.
        let got = unsafe { sys::cuModuleEnumerateFunctions(functions.as_mut_ptr(), count, module) };
        check("cuModuleEnumerateFunctions", got)?;
        for raw in functions {
            let mut text = std::ptr::null();
            // SAFETY: the function belongs to the module; the driver writes a pointer to its name.
            check("cuFuncGetName", unsafe { sys::cuFuncGetName(&raw mut text, raw) })?;
            // SAFETY: a terminated string that lives as long as the module; copied here.
            let name: Arc<str> = unsafe { CStr::from_ptr(text) }.to_string_lossy().into();
            let (mut offset, mut parameters) = (0, 0);
            // SAFETY: both pointers are to live integers.
            let got =
                unsafe { sys::cuFuncGetParamInfo(raw, 0, &raw mut offset, &raw mut parameters) };
            check("cuFuncGetParamInfo", got)?;
            let kernel =
                Kernel { name: Arc::clone(&name), raw, parameters, launches: Arc::default() };
            self.by_name.insert(name, kernel);
        }
        Ok(())
    }

    /// A kernel by name.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn get(&self, name: &str) -> Result<&Kernel, CudaError> {
        self.by_name.get(name).ok_or_else(|| CudaError::NoKernel { name: name.to_owned() })
    }

    /// Lets a kernel be launched with all the shared memory that a block can have: `bytes` less what
    /// the kernel has fixed.
    ///
    /// # Errors
    /// When there is no such kernel, or the device has less.
    pub fn allow_shared(&self, name: &str, bytes: u32) -> Result<(), CudaError> {
        let kernel = self.get(name)?;
        let fixed = kernel.attribute(Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?;
        let which = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let value = i32::try_from(bytes.saturating_sub(fixed)).unwrap_or(i32::MAX);
        // SAFETY: the function belongs to a loaded module.
        check("cuFuncSetAttribute", unsafe { sys::cuFuncSetAttribute(kernel.raw, which, value) })
    }

    /// All of them, by name.
    pub fn iter(&self) -> impl Iterator<Item = &Kernel> {
        self.by_name.values()
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            for module in &self.modules {
                // SAFETY: loaded in `load`, unloaded once.
                unsafe { sys::cuModuleUnload(*module) };
            }
        }
    }
}
