/* What NVIDIA's Python bindings look for in libnvinfer, libnvinfer_plugin and libnvonnxparser
   when they are imported. The registry is an object all of whose methods answer nothing. */
static void *nothing(void) { return 0; }
static void *methods[128];
static void **registry = methods;

static void *get(void)
{
    for (int i = 0; i < 128; ++i)
        methods[i] = (void *)nothing;
    return &registry;
}

void *getPluginRegistry(void) { return get(); }
void *getBuilderPluginRegistry(int capability) { return get(); }
void *createInferBuilder_INTERNAL(void) { return 0; }
void *createInferRuntime_INTERNAL(void) { return 0; }
void *createInferRefitter_INTERNAL(void) { return 0; }
void *createNvOnnxParser_INTERNAL(void) { return 0; }
void *createNvOnnxParserRefitter_INTERNAL(void) { return 0; }
int getNvOnnxParserVersion(void) { return 0; }
_Bool initLibNvInferPlugins(void) { return 1; }
